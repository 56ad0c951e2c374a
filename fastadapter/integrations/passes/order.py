"""In which order a module's hooks run."""

from torch import nn
from torch.utils.hooks import RemovableHandle


def put_first(module: nn.Module, handle: RemovableHandle) -> RemovableHandle:
    """Let the forward hook or pre-hook of ``handle`` run before the others of ``module``; the handle comes back.

    What ``prepend=True`` does, which moves it within the ordered dictionary alone: torch.compile counts the entries of
    the plain dictionary beneath, in which they stand as they were put in, and took one hook for another (torch 2.11).
    """
    hooks = next(each for each in (module._forward_pre_hooks, module._forward_hooks) if handle.id in each)
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)
    return handle
