"""What carries adapters inside a model: one child module per adapted module, and the state they share.

As child modules, adapters move, save, shard and synchronise with the model.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastadapter.integrations.passes.choice import Choice, State, may_keep, under_way
from fastadapter.integrations.passes.frozen import say_if_frozen
from fastadapter.integrations.passes.kept import Kept, Part
from fastadapter.integrations.passes.shortcut import Handle

# Banks and the like that one host keeps; serving switches between few mixes.
_KEPT = 16
_KEYS = itertools.count()


class Group(NamedTuple):
    """Adapters of one kind and size, and the rows of the batch that each acts on.

    ``row_ids`` int32 ``(batch,)`` counts ``names`` from 0, -1 elsewhere; ``members`` int64 are the rows that have an
    id. Both are ``None`` where ``names`` is one adapter for all rows.
    """

    names: tuple[str, ...]
    row_ids: Tensor | None
    members: Tensor | None


class Step(NamedTuple):
    """What a host does in every pass with a ``stamp``: ``act``, or nothing.

    ``whole`` is what the module with its host comes to, in place of the module, its hooks and ``act``.
    """

    stamp: object
    act: Callable[..., Any] | None
    whole: Callable[..., Any] | None = None


class Adapters(nn.Module):
    """The adapters of one host by name, in the order they came.

    A name is data: one that is also an attribute of a module (``train``, ``type``) is no trouble. The child is called
    like the adapter, as the keys of a state dictionary say, or with ``=`` in front where that would hide an attribute.
    """

    def __getitem__(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[child_name(name)])

    def __setitem__(self, name: str, adapter: nn.Module) -> None:
        self._modules[child_name(name)] = adapter

    def __delitem__(self, name: str) -> None:
        del self._modules[child_name(name)]

    def __contains__(self, name: object) -> bool:
        return name is not None and child_name(cast(str, name)) in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix("=") for key in self._modules)

    def items(self) -> list[tuple[str, nn.Module]]:
        return [(name, self[name]) for name in self]


_TAKEN = frozenset(dir(Adapters())) | {"forward"}


def child_name(name: str) -> str:
    """How the module of an adapter is called among those of its host."""
    return f"={name}" if name in _TAKEN else name


class Host(nn.Module):
    """The adapters of one module of the model, by name; lives in it as the child ``CHILD``.

    ``key`` tells hosts apart in what a thread keeps for hooks of the same pass (:func:`~.choice.left_behind`).
    """

    CHILD: ClassVar[str]
    GROUPED: ClassVar[bool] = True  # whether it acts by groups of rows
    HOOKS: ClassVar[int] = 1  # how many it has on its module

    def __init__(self, state: State):
        super().__init__()
        self.adapters = Adapters()
        self.state = state
        self.key = next(_KEYS)
        self._groups: dict[Any, list[Group]] = {}
        self._kept: dict[Any, Kept] = {}
        self._step: Step | None = None

    @property
    def choice(self) -> Choice:
        """Who acts in the pass under way."""
        return self.state.acting()

    def idle(self) -> bool:
        """Whether the module is to run as if nothing were attached."""
        choice = self.state.acting()
        if choice.rows is None:
            return choice.active is None or choice.active not in self.adapters
        return not any(name in self.adapters for name in choice.rows)

    def groups(self, batch: int, device: torch.device) -> list[Group]:
        """The adapters that act on a batch, those that one call of an op can take together in one group."""
        choice = self.state.acting()
        rows = choice.row_names(batch)
        say_if_frozen(self, choice.names())
        if rows is None:
            name = choice.active
            return [Group((name,), None, None)] if name is not None and name in self.adapters else []
        key = (rows, device)
        found = self._groups.get(key)
        if found is None:
            found = self._grouped(rows, device)
            if may_keep(device):
                self._groups = {key: found}  # the last one: a batch is many calls
        return found

    def prepare_rows(self, rows: tuple[str | None, ...]) -> None:
        """Make the groups of the rows that were chosen, before a compiler or a CUDA graph would have to.

        A compiled graph would copy them to the device in every call, which also keeps it from being recorded.
        """
        device = next((each.device for each in self.parameters()), None)
        if self.GROUPED and device is not None:
            self.groups(len(rows), device)

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

    def keeps(self) -> bool:
        """Whether the pass under way may use what another one made, and keep what it makes."""
        run = under_way()
        return run is not None and run.keeps and run.state is self.state and not self.training

    def keep(
        self,
        key: Any,
        parts: Callable[[], Iterable[Part]],
        make: Callable[[], Any],
        read_anew: Callable[[Any], Iterable[Tensor]] | None = None,
    ) -> Any:
        """What ``make`` gives, kept between passes that cannot need a gradient through it.

        Args:
            parts: all that it is made from.
            read_anew: the tensors of what was made whose values are looked at in every pass.
        """
        if not self.keeps():
            return make()
        kept = self._kept.get(key)
        if kept is None or not kept.is_valid:
            kept = self.state.store.make(make, parts(), read_anew)
            if kept is None:
                return make()
            if len(self._kept) >= _KEPT:
                self.forget_kept()
            self._kept[key] = kept
        return kept.value

    def step(self) -> Step | None:
        """What an earlier pass like the one under way settled; ``None``: it has to be asked again."""
        step = self._step
        if step is None or torch.compiler.is_compiling():
            return None
        run = under_way()
        return step if run is not None and run.stamp is step.stamp else None

    def settle(self, act: Callable[..., Any], *keys: Any, whole: Callable[..., Any] | None = None) -> None:
        """Let later passes like this one call ``act`` without asking who acts and with what.

        Args:
            act: what cannot be known now, such as a dtype, it has to look at itself.
            keys: of :meth:`keep`, what it holds. A change of that ends the step.
            whole: called with the module and its arguments where the module has a shortcut.
        """
        found = [self._kept.get(key) for key in keys]
        if all(kept is not None and kept.is_valid for kept in found):
            self._settle(act, whole)

    def settle_idle(self) -> None:
        """The same where nothing acts."""
        self._settle(None)

    def _settle(self, act: Callable[..., Any] | None, whole: Callable[..., Any] | None = None) -> None:
        run = under_way()
        if run is not None and self.keeps() and not torch.compiler.is_compiling():
            self._step = Step(run.stamp, act, whole)

    def kind(self, adapter: nn.Module) -> Any:
        """What two adapters must share to go through one call of an op."""
        raise NotImplementedError

    def adapter(self, name: str) -> Any:
        return self.adapters[name]

    def hooks(self, module: nn.Module) -> Sequence[Handle]:
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
        self._groups = {}
        self.forget_kept()

    def forget_kept(self) -> None:
        self._step = None
        for kept in self._kept.values():
            kept.is_valid = False
        self._kept = {}

    def train(self, mode: bool = True):
        self.forget()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:  # a copy makes its own
        return {**self.__dict__, "_groups": {}, "_kept": {}, "_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.key = next(_KEYS)


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
