"""The model behind what others put around it: DDP, averages of weights, compilers, trainers.

Found by structure, since every library has a wrapper of its own: the adapted model is the module that carries the
record of its adapters, wherever it is.
"""

import re

from torch import nn

# Where a model keeps the record of what is attached to it. Looked up in `__dict__`: some wrappers pass every attribute
# of theirs that is missing on to the model, and would seem to carry it.
RECORD = "_fastadapter"
# Parts of names that stand for a wrapper inside of a model: a compiled, sharded or checkpointed block. It passes
# attributes on, so that paths work without them; and a file is to be read by a model without such wrappers.
_INSIDE = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(model: nn.Module) -> nn.Module:
    """The adapted model in ``model``: itself, or the one module somewhere in it that adapters are attached to.

    Where nothing is attached yet, the model behind wrappers: modules without parameters and without a configuration of
    their own around a single child that has some.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there are several adapted models in it.

    >>> from torch.optim.swa_utils import AveragedModel
    >>> averaged = AveragedModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    >>> type(unwrap(averaged)).__name__
    'Sequential'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if RECORD in model.__dict__:
        return model
    adapted = {path: module for path, module in model.named_modules() if RECORD in module.__dict__}
    if len(adapted) > 1:
        raise ValueError(
            f"model: {type(model).__name__} holds several adapted models ({', '.join(adapted)}); "
            f"pass one of them, such as model.{next(iter(adapted))}"
        )
    return next(iter(adapted.values())) if adapted else _bare(model)


def layers_around(model: nn.Module) -> list[nn.Module]:
    """What is wrapped around the model that :func:`unwrap` finds, from the outside in."""
    inner, around = unwrap(model), []
    while model is not inner:
        around.append(model)
        model = next(child for child in model.children() if any(each is inner for each in child.modules()))
    return around


def _bare(model: nn.Module) -> nn.Module:
    """The model behind wrappers that carries no adapter; ``model`` itself where nothing tells one from the other."""
    inner = model
    while "config" not in inner.__dict__:
        children = [child for child in inner.children() if any(True for _ in child.parameters())]
        if len(children) != 1 or inner._parameters or isinstance(inner, nn.Sequential | nn.ModuleList):
            break
        inner = children[0]
    return inner


def plain(name: str) -> str:
    """The name of a module or parameter as it is without wrappers inside the model.

    >>> plain("model.layers.0._orig_mod.mlp.weight")
    'model.layers.0.mlp.weight'
    """
    return _INSIDE.sub("", f"{name}.")[:-1]
