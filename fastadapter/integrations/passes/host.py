"""What carries adapters inside a model: one child module per adapted module, and the state they share.

As child modules, adapters move, save, shard and synchronise with the model.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes.frozen import say_if_frozen

# Banks and the like that one host keeps; serving switches between few mixes.
_KEPT = 16


class State:
    """Which adapter acts: one for all rows, or one per row. Shared by all hosts of a model.

    Attributes:
        active: the adapter that acts on every row, if ``rows`` is ``None``.
        rows: an adapter, or ``None``, for every row of the batch.
        factor: how often beam search repeats every row, from the last call of ``generate``.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.rows: tuple[str | None, ...] | None = None
        self.factor = 1
        self._tensors: dict[Any, Tensor] = {}

    @contextlib.contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Let one adapter act, whatever was chosen."""
        kept = self.active, self.rows
        self.active, self.rows = name, None
        try:
            yield
        finally:
            self.active, self.rows = kept

    def tensor(self, values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Some numbers on a device, the same tensor for every host that asks for them; not to be written to.

        Raises: RuntimeError: a CUDA graph is being recorded, and the numbers are new.
        """
        key = (values, dtype, device)
        found = self._tensors.get(key)
        if found is not None:
            return found
        found = torch.tensor(values, dtype=dtype)
        if torch.compiler.is_compiling():
            return found.to(device)
        if not may_keep(device):
            raise RuntimeError(
                "rows: enter rows(...) and call the model once before a CUDA graph is captured"
            )
        if device.type == "cuda":  # without waiting for it
            found = found.pin_memory()
        if len(self._tensors) >= _KEPT:
            self._tensors = {}
        self._tensors[key] = found.to(device, non_blocking=True)
        return self._tensors[key]

    def row_names(self, batch: int) -> tuple[str | None, ...] | None:
        """The adapter of every row of a batch; ``None`` when one acts on all.

        Raises: ValueError: the batch has another number of rows.
        """
        if self.rows is None:
            return None
        if batch == len(self.rows):
            return self.rows
        if batch == len(self.rows) * self.factor:
            return tuple(name for name in self.rows for _ in range(self.factor))
        raise ValueError(f"rows: {len(self.rows)} adapters were named for a batch of {batch} rows")


class Group(NamedTuple):
    """Adapters of one kind and size, and the rows of the batch that each acts on.

    ``row_ids`` int32 ``(batch,)`` counts ``names`` from 0, -1 elsewhere; ``members`` int64 are the rows that have an
    id. Both are ``None`` where ``names`` is one adapter for all rows.
    """

    names: tuple[str, ...]
    row_ids: Tensor | None
    members: Tensor | None


class Host(nn.Module):
    """The adapters of one module of the model, by name; lives in it as the child ``CHILD``."""

    CHILD: ClassVar[str]
    GROUPED: ClassVar[bool] = True  # whether it acts by groups of rows

    def __init__(self, state: State):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.state = state
        self._groups: dict[Any, list[Group]] = {}
        self._kept: dict[Any, tuple[Any, Any, Any]] = {}

    @property
    def active(self) -> str | None:
        """The adapter that acts here on every row, if one does."""
        name = self.state.active
        return name if self.state.rows is None and name in self.adapters else None

    def idle(self) -> bool:
        """Whether the module is to run as if nothing were attached."""
        rows = self.state.rows
        if rows is None:
            return self.state.active is None or self.state.active not in self.adapters
        return not any(name in self.adapters for name in rows)

    def groups(self, batch: int, device: torch.device) -> list[Group]:
        """The adapters that act on a batch, those that one call of an op can take together in one group."""
        rows = self.state.row_names(batch)
        say_if_frozen(self, rows or (self.state.active,))
        if rows is None:
            name = self.active
            return [] if name is None else [Group((name,), None, None)]
        key = (rows, device)
        found = self._groups.get(key)
        if found is None:
            found = self._grouped(rows, device)
            if may_keep(device):
                self._groups = {key: found}  # the last one: a batch is many calls
        return found

    def prepare_rows(self) -> None:
        """Make the groups of the rows that were chosen, before a compiler or a CUDA graph would have to.

        A compiled graph would copy them to the device in every call, which also keeps it from being recorded.
        """
        device = next((each.device for each in self.parameters()), None)
        if self.GROUPED and device is not None and self.state.rows is not None:
            self.groups(len(self.state.rows), device)

    def _grouped(self, rows: tuple[str | None, ...], device: torch.device) -> list[Group]:
        kinds: dict[Any, list[str]] = {}
        for name in dict.fromkeys(rows):
            if name is not None and name in self.adapters:
                kinds.setdefault(self.kind(self.adapters[name]), []).append(name)
        found = []
        for names in kinds.values():
            ids = [names.index(name) if name in names else -1 for name in rows]
            members = [row for row, each in enumerate(ids) if each >= 0]
            found.append(
                Group(
                    tuple(names),
                    self.state.tensor(tuple(ids), torch.int32, device),
                    self.state.tensor(tuple(members), torch.int64, device),
                )
            )
        return found

    def keep(self, key: Any, sources: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """What ``make`` gives, kept between calls that cannot need a gradient through it.

        Valid while every tensor of ``sources`` is the same version of the same storage; not kept where versions are
        not counted (tensors made under inference mode) or cannot be checked at run time (:func:`may_keep`).
        """
        if self.training or torch.is_grad_enabled() or not (sources and may_keep(sources[0].device)):
            return make()
        if any(tensor.is_inference() for tensor in sources):
            return make()
        now = stamp(sources)
        kept = self._kept.get(key)
        if kept is None or kept[0] != now:
            # Made outside inference mode, the tensors stay usable wherever the model is called from next.
            with torch.inference_mode(False), torch.no_grad():
                kept = (now, make(), sources)
            if len(self._kept) >= _KEPT:
                self._kept = {}
            self._kept[key] = kept
        return kept[1]

    def kind(self, adapter: nn.Module) -> Any:
        """What two adapters must share to go through one call of an op."""
        raise NotImplementedError

    def adapter(self, name: str) -> Any:
        return self.adapters[name]

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        """Register what makes the host act in its ``module``; functions of a module, so that a model can be copied."""
        return []

    def add(self, name: str, adapter: nn.Module, **options: Any) -> None:
        self.adapters[name] = adapter
        self.forget()

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self.forget()

    def forget(self) -> None:
        """Drop everything that was kept between calls."""
        self._groups, self._kept = {}, {}

    def train(self, mode: bool = True):
        self.forget()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.forget()
        return super()._apply(fn, recurse)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.forget()


def may_keep(device: torch.device) -> bool:
    """Whether what is made now can be used by later calls.

    Not in a compiled graph, and not while a CUDA graph is recorded: nothing is computed then, and the memory is the
    graph's own.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def stamp(sources: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes whenever one of some tensors is written to or replaced."""
    return [(tensor._version, tensor.data_ptr()) for tensor in sources]


class Placement(NamedTuple):
    """One adapter module, where it goes, and how to make the host where none is yet.

    ``options`` go to the host's ``add``; ``watch`` is the path of a module whose input the host has to see.
    """

    path: str
    host: type[Host]
    adapter: nn.Module
    make: Callable[[State], Host]
    options: Any = None
    watch: str | None = None


class ReparamHost(Host):
    """The networks behind prefixes; they belong to the model around the blocks, not to one of them."""

    CHILD: ClassVar[str] = "fa_reparam"
    GROUPED: ClassVar[bool] = False


# An adapter's module in a model: the path of the module it is in, and the kind of host there.
Place = tuple[str, type[Host]]


def host_of(module: nn.Module, host: type[Host]) -> Any:
    """The host of one kind in a module, if it has one."""
    return cast("Host | None", module._modules.get(host.CHILD))
