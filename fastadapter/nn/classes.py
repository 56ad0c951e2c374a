"""Modules that get a class of their own, made from the one they have: another way to compute the same.

A class rather than an attribute or a hook: whatever copies, pickles, wraps, shards or compiles modules goes on as
before (PyTorch's parametrisations and FSDP2 do the same). It is called like the class that it was made from.
"""

from typing import Any, ClassVar

from torch import nn

_MADE: dict[Any, type[nn.Module]] = {}


class Derived(nn.Module):
    """What a class made here has before the module's own."""

    FA_BASE: ClassVar[type[nn.Module]]
    FA_PARTS: ClassVar[tuple]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """A copy and a pickle name what the class is made of."""
        state = super().__reduce_ex__(2)[2:]
        return (_made_anew, (self.FA_BASE, self.FA_PARTS), *state)


def _derived(base: type[nn.Module], parts: tuple) -> type[nn.Module]:
    return _MADE.get((base, parts)) or _MADE.setdefault((base, parts), _make(base, parts))


def _make(base: type[nn.Module], parts: tuple) -> type[nn.Module]:
    found = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    constants = {key: value for _, settings in parts for key, value in settings}
    mixins = tuple(mixin for mixin, _ in reversed(parts))
    made = {**found, **constants, "FA_BASE": base, "FA_PARTS": parts}
    return type(base.__name__, (Derived, *mixins, base), made)


def _made_anew(base: type[nn.Module], parts: tuple) -> nn.Module:
    kind = _derived(base, parts)
    return kind.__new__(kind)


def _own(module: nn.Module) -> type[Derived] | None:
    """The class of a module if it was made here, not made by others from one of ours."""
    kind = type(module)
    return kind if issubclass(kind, Derived) and "FA_PARTS" in kind.__dict__ else None


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module before anything was put before it."""
    own = _own(module)
    return type(module) if own is None else own.FA_BASE


def put_before(module: nn.Module, mixin: type[nn.Module], **constants: Any) -> None:
    """Let ``mixin``, with these constants, come before the class of ``module``; what is there already stays."""
    own = _own(module)
    parts = () if own is None else own.FA_PARTS
    if all(each is not mixin for each, _ in parts):
        module.__class__ = _derived(class_of(module), (*parts, (mixin, tuple(constants.items()))))


def take_away(module: nn.Module, mixin: type[nn.Module]) -> None:
    """The opposite."""
    own = _own(module)
    if own is not None:
        parts = tuple(part for part in own.FA_PARTS if part[0] is not mixin)
        module.__class__ = _derived(own.FA_BASE, parts) if parts else own.FA_BASE
