"""The model's own rotary embedding of queries and keys through our kernel on a CPU, where it gives the same bits.

In transformers that is a function of the module that a family's attention is defined in, a dozen operations in every
layer. While a model of the family has an adapter the function is one that calls our kernel; for every model of the
family, as nothing that it is given says whose layers call, and a layer that is run again in backward has to do what it
did. As in :mod:`.frozen_parts`, it is proven by what it gives.
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.passes.frozen_parts import is_for_kernel
from fastadapter.nn.classes import class_of
from fastadapter.ops.backends import extension_error
from fastadapter.ops.frozen import rotary, run_rotary

_NAME = "apply_rotary_pos_emb"
_OWN = "fa_own"  # the attribute of our function with the family's
_Function = Callable[..., tuple[Tensor, Tensor]]

# Attentions that hold an adapter's model together with the function, by the namespace that it is in.
_users: "dict[int, weakref.WeakSet[nn.Module]]" = {}
_spaces: dict[int, dict[str, Any]] = {}


def install(model: nn.Module) -> None:
    """Let the attentions of ``model`` rotate by the kernel, where their function is what it takes it for."""
    if extension_error("rotary"):
        return
    for module, space in _attentions(model):
        if not _is_on_cpu(module):
            continue
        if not hasattr(space[_NAME], _OWN):
            if not _proves(space[_NAME]):
                continue
            space[_NAME] = _through_kernel(space[_NAME])
        _spaces[id(space)] = space
        _users.setdefault(id(space), weakref.WeakSet()).add(module)


def remove(model: nn.Module) -> None:
    """Put the functions back that no other model needs."""
    for module, space in _attentions(model):
        users = _users.get(id(space), weakref.WeakSet())
        users.discard(module)
        # whoever replaced it since keeps it within theirs
        if not users and hasattr(space[_NAME], _OWN):
            space[_NAME] = getattr(space[_NAME], _OWN)


def count(model: nn.Module) -> int:
    """How many attentions of ``model`` use the kernel."""
    return sum(hasattr(space[_NAME], _OWN) and _is_on_cpu(module) for module, space in _attentions(model))


def _is_on_cpu(module: nn.Module) -> bool:
    return all(each.is_cpu for each in module.parameters())


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Every family's own function while the context lasts, for measurements of models as they are without us."""
    ours = [(space, space[_NAME]) for space in _spaces.values() if hasattr(space[_NAME], _OWN)]
    for space, function in ours:
        space[_NAME] = getattr(function, _OWN)
    try:
        yield
    finally:
        for space, function in ours:
            space[_NAME] = function


def _attentions(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The modules that call a function of that name, and the namespace in which they find it."""
    found = []
    for module in model.modules():
        forward = inspect.unwrap(class_of(module).forward)
        code, space = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        if code is not None and _NAME in code.co_names and callable(space.get(_NAME)):
            found.append((module, space))
    return found


def _through_kernel(own: _Function) -> _Function:
    # Once per layer and token, with nothing in the caches: one function for all that is asked.
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            not (args or kwargs)
            and is_for_kernel(q, k)
            and type(cos) is type(sin) is Tensor
            and cos.dtype is sin.dtype is q.dtype
        ):
            shape, angles = q.shape, cos.shape
            # not of a part of a head, nor broadcast otherwise than over the batch
            if (
                len(shape) == 4
                and angles[1:] == shape[2:]
                and angles[0] in (1, shape[0])
                and angles == sin.shape
                and (shape[0], *shape[2:]) == (k.shape[0], *k.shape[2:])
            ):
                if not torch.is_grad_enabled():
                    return run_rotary("cpp", q, k, cos, sin, False)
                if not (cos.requires_grad or sin.requires_grad):
                    return rotary(q, k, cos, sin)
        return own(q, k, cos, sin, *args, **kwargs)

    setattr(apply_rotary_pos_emb, _OWN, own)
    return apply_rotary_pos_emb


def _proves(own: _Function) -> bool:
    """The same bits forward and backward, on random values, laid out as projections lie."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    q, k, cos, sin = random(2, 5, 4, 16), random(2, 5, 2, 16), random(2, 5, 16), random(2, 5, 16)
    functions: list[_Function] = [own, rotary]
    found = []
    for function in functions:
        with torch.enable_grad():
            given = [each.clone().requires_grad_() for each in (q, k)]
            try:
                turned = function(*(each.transpose(1, 2) for each in given), cos, sin)
                gradients = torch.autograd.grad(turned, given, [2 * each.detach() for each in turned])
            except Exception:  # only its own code knows what it takes: another than ours
                return False
        found.append((*turned, *gradients))
    theirs, ours = found
    return all(map(torch.equal, theirs, ours)) and all(
        each.stride() == other.stride() for each, other in zip(theirs[:2], ours[:2], strict=True)
    )
