"""Find the trunk of a run, say what its cache will cost and save, compute what is missing, and let the run use it."""

import contextlib
import functools
import inspect
import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from fastadapter.checkpoints import CheckpointError
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.training import evaluating
from fastadapter.training.config import TrainingInterrupted, UserError
from fastadapter.training.report import write_json
from fastadapter.training.state import random_states, restore_random
from fastadapter.training.targets import AdapterTarget
from fastadapter.training.trunk import find, prove, worth
from fastadapter.training.trunk.cached import Trunk, give
from fastadapter.training.trunk.identity import backbone, describe_trunk, digest_json
from fastadapter.training.trunk.options import DTYPES, TrunkCache
from fastadapter.training.trunk.start import NoTrunk, NotWorth, StartPoint
from fastadapter.training.trunk.store import ABOUT_FILE, Shard, Store, make_room, size_text

_ROWS = 32  # sequences of one forward pass of the trunk
T = TypeVar("T")


@contextlib.contextmanager
def cached_trunk(run: Any, options: TrunkCache, asked: bool | None) -> Iterator[None]:
    """Let the passes of a run, which has begun, start behind its trunk while the context lasts.

    Args:
        asked: ``None``: where it pays, and as the run that is resumed did.
    Raises:
        UserError: it was asked for and cannot be had, with the reason.
        CheckpointError: it was asked for, and a file cannot be written.
        TrainingInterrupted: a signal came; the shards that are done are kept.
    """
    before = run.progress.trunk_cached
    if asked is False or (asked is None and before is False):
        if before:
            run.reporter.line(
                "trunk cache: the run was begun with it and goes on without: last bits may differ"
            )
        run.progress.trunk_cached = False
        yield
        return
    builder = Builder(run, options, asked is True)
    random = random_states(run.accelerator.device)
    point = None
    try:
        point = builder.prepare(pays=not asked and not before)
    except (NoTrunk, CheckpointError) as why:
        if asked:
            raise (UserError(f"trunk_cache: {why}") if isinstance(why, NoTrunk) else why) from why
        if before or (builder.told and not isinstance(why, NotWorth)):
            run.reporter.line(f"trunk cache: none, {why}")
    finally:
        restore_random(random, run.accelerator.device)
    run.progress.trunk_cached = point is not None
    try:
        with contextlib.nullcontext() if point is None else point:
            yield
    finally:
        give(run.task, None)


class Builder:
    """The work for one run.

    Attributes:
        told: whether a reason why there is no cache would be news: blocks are frozen.
        computed: tokens whose states this process computed.
    """

    def __init__(self, run: Any, options: TrunkCache, asked: bool):
        self.run, self.options, self.told = run, options, asked
        self.computed = 0
        self.model, self.task, self.accelerator = run.model, run.task, run.accelerator
        self.device: torch.device = run.accelerator.device

    def prepare(self, pays: bool) -> StartPoint:
        """What the run is to begin at, when its task has the states.

        Raises: NoTrunk: there is nothing, or it does not pay; CheckpointError: a file cannot be written.
        """
        started = time.perf_counter()
        point, store, about = self._together(lambda: self._examine(pays))
        held = self.task.held_out
        groups = [self.task.sequences(), held.sequences() if held is not None else []]
        shards = [shard for group in groups for shard in store.shards(group)]
        missing = [shard for shard in shards if not shard.path.exists()]
        self._together(lambda: self._announce(point, store, about, shards, missing, pays))
        with point:
            states = self._together(lambda: self._fill(point, store, shards))
        trunk = Trunk()
        for shard, each in zip(shards, states, strict=True):
            trunk.add(shard.sequences, each)
        give(self.task, trunk)
        seconds = time.perf_counter() - started
        self.run.reporter.paused += seconds  # not a part of how fast steps are
        tokens = sum(shard.tokens for shard in shards)
        computed = torch.tensor([self.computed], device=self.device)
        self.run.trunk = {
            "blocks": point.index,
            "of": len(point.blocks),
            "tokens": tokens,
            "computed_tokens": int(self.accelerator.gather(computed).sum()),
            "bytes": tokens * store.token_bytes,
            "seconds": seconds,
            "trunk": store.folder.name,
        }
        return point

    def _examine(self, pays: bool) -> tuple[StartPoint, Store, dict[str, Any]]:
        """Find the trunk, and prove on a few rows that passes may begin behind it."""
        stack = find.find_stack(self.model)
        if pays:
            worth.require_large(stack.blocks, worth.Work.of(self.run, self.options.runs), self.device.type)
        rows = self.task.layout.passes(prove.probe_rows(self.task.lengths))[0]
        random = random_states(self.device)
        whole: list[tuple[float, Tensor]] = []
        training = self.model.training
        self.model.train()
        try:
            seen = find.observe(
                self.model,
                stack,
                self.device,
                lambda: whole.append(prove.loss_and_gradient(self.run, rows)),
            )
            if any(not each.trained for each in seen.behind):
                self.told = True
            name = self.run.target.name if isinstance(self.run.target, AdapterTarget) else None
            size = find.trunk_size(self.model, stack, seen, name)
            point = StartPoint(stack.blocks, size, [each.length for each in seen.behind])
            shape, dtype = seen.behind[size - 1].states
            sequences = [self.task.sequences()[row] for row in rows]
            trunk = Trunk()
            with point:
                trunk.add(sequences, self._states(point, sequences, DTYPES[self.options.dtype] or dtype))
                give(self.task, trunk)
                restore_random(random, self.device)
                begun = prove.loss_and_gradient(self.run, rows)
        except (NoTrunk, TrainingInterrupted):
            raise
        except Exception as error:  # of a model that is unlike any that was thought of
            raise NoTrunk(f"a pass of the model failed: {type(error).__name__}: {error}") from error
        finally:
            give(self.task, None)
            self.model.train(training)
        stored = DTYPES[self.options.dtype] or dtype
        prove.require_same(whole[0], begun, stored)
        about = describe_trunk(
            self.model,
            find.below(self.model, stack, seen, size),
            stack.path,
            size,
            stored,
            inputs=sorted(self.task.inputs(sequences[:1], torch.device("cpu"))),
            precision=self.accelerator.mixed_precision,
        )
        store = Store(self.options.root, digest_json(about), shape[-1], stored)
        return point, store, {**about, "model": self.run.identity["model"]["class"]}

    def _announce(
        self,
        point: StartPoint,
        store: Store,
        about: dict[str, Any],
        shards: list[Shard],
        missing: list[Shard],
        pays: bool,
    ) -> None:
        """Say what it takes and saves, and make room for it."""
        work = worth.Work.of(self.run, self.options.runs)
        absent = sum(shard.tokens for shard in missing)
        saved = worth.saving(point.blocks, point.index, work, absent)
        if pays:
            worth.require_saving(saved, self.device.type)
        if not self.accelerator.is_main_process:
            return
        tokens = sum(shard.tokens for shard in shards)
        self.run.reporter.line(
            f"trunk cache: {point.index} of {len(point.blocks)} blocks compute the same in every pass; their states "
            f"for {tokens:,} tokens are {size_text(tokens * store.token_bytes)} in {store.folder}, "
            f"{'all there' if not absent else f'{absent:,} of them to be computed once'}; "
            f"{saved.share:.0%} of the run's arithmetic is saved"
        )
        if not missing:
            return
        kept = [shard.path for shard in shards]
        removed = make_room(self.options.root, absent * store.token_bytes, self.options.max_bytes, kept)
        if removed:
            self.run.reporter.line(f"trunk cache: removed {size_text(removed)} that was not used for longest")
        if not (store.folder / ABOUT_FILE).exists():
            write_json(store.folder / ABOUT_FILE, about)

    def _fill(self, point: StartPoint, store: Store, shards: list[Shard]) -> list[Tensor]:
        accelerator, reporter = self.accelerator, self.run.reporter
        first = accelerator.process_index * len(shards) // accelerator.num_processes
        total = sum(shard.tokens for shard in shards)
        with (
            self.run.signals as signals,
            tqdm(
                total=total,
                desc="trunk",
                unit="token",
                unit_scale=True,
                leave=False,
                disable=reporter.lines or not reporter.enabled,
            ) as bar,
        ):
            there = 0

            def done(tokens: int) -> None:
                nonlocal there
                there += tokens
                bar.update(tokens)

            def compute(shard: Shard) -> Tensor:
                if there and reporter.is_due():
                    reporter.line(f"trunk cache: {there:,} of {total:,} tokens")
                self.computed += shard.tokens
                return self._states(point, shard.sequences, store.dtype, lambda: self._stop(signals.received))

            return store.fill(shards, compute, reporter.line, done, first)

    def _stop(self, number: int | None) -> None:
        # With several processes the others would wait for this one's shards: the run stops after its first step.
        if number and self.accelerator.num_processes == 1:
            raise TrainingInterrupted(
                number,
                f"stopped by {signal.Signals(number).name} while the trunk was cached; what is done is kept; "
                f"{self.run.output_dir} can be resumed",
            )

    def _states(
        self,
        point: StartPoint,
        sequences: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        between: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The states of some sequences one behind another, on the CPU. The same sequences give the same bits."""
        base: Any = backbone(self.model)
        options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        starts = [0, *itertools.accumulate(map(len, sequences))]
        found: Tensor | None = None
        with evaluating(unwrap(self.model)), self.accelerator.autocast():
            for low in range(0, len(order), _ROWS):
                between()
                chunk = order[low : low + _ROWS]
                inputs = self.task.inputs([sequences[index] for index in chunk], self.device)
                states = point.states(functools.partial(base, **inputs, **options)).to("cpu", dtype)
                if found is None:
                    found = torch.empty(starts[-1], states.shape[-1], dtype=dtype, device="cpu")
                for row, index in enumerate(chunk):
                    found[starts[index] : starts[index + 1]] = states[row, : len(sequences[index])]
        assert found is not None
        return found

    def _together(self, step: Callable[[], T]) -> T:
        """Do a step in every process; where it fails in one, it does in all."""
        problem: NoTrunk | CheckpointError | None = None
        result: Any = None
        try:
            result = step()
        except (NoTrunk, CheckpointError) as error:
            problem = error
        failed = torch.tensor([float(problem is not None)], device=self.device)
        if float(self.accelerator.gather(failed).sum()):
            raise problem or NoTrunk("another process of this run cannot have it")
        return result
