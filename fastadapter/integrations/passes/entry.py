"""Where a forward pass of a model begins and ends, and what it takes along when its layers are recomputed.

Hooks on the model and on the models inside it that can be called by themselves (a decoder without its head). The first
of them that is entered begins the pass: it settles who acts, waits for verbs that are changing the adapters, and checks
once for all layers what was kept. A compiled graph has neither: its parameters are its inputs.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes import choice, positions
from fastadapter.integrations.passes.choice import Pass, State, is_captured
from fastadapter.integrations.passes.host import Host
from fastadapter.integrations.passes.order import put_first

# Attributes of modules that hold a function which runs them, or their layers, again in backward.
CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")
_STATE = "fa_state"


def entries(model: nn.Module) -> list[nn.Module]:
    """The modules of an adapted model that calls come through: itself and the models inside it that hold adapters."""
    found = [model]
    for module in model.modules():
        if module is model or not hasattr(type(module), "base_model_prefix"):
            continue
        if any(isinstance(each, Host) for each in module.modules()):
            found.append(module)
    return found


def install(module: nn.Module, state: State) -> list[RemovableHandle]:
    """Let passes begin and end at ``module``."""
    module.__dict__[_STATE] = state
    return [
        *positions.hooks(module, state),
        put_first(module, module.register_forward_pre_hook(_begin)),
        # also after an error, so that nobody waits for a pass that failed
        module.register_forward_hook(_end, always_call=True),
    ]


def remove(module: nn.Module, handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    module.__dict__.pop(_STATE, None)


def _begin(module: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling():
        return
    state: State = module.__dict__[_STATE]
    if not state.traffic.begin(sys._getframe(1)):
        return
    try:
        keeps = not (module.training or torch.is_grad_enabled()) and not is_captured()
        keeps = keeps and not _is_recorded()
        if keeps:
            state.store.check()  # before the pass takes its stamp
        run = Pass.begun(state, keeps)
        if module.training and torch.is_grad_enabled():
            _carry_into_recomputation(module, state)
    except BaseException:
        state.traffic.end()
        raise
    if run.outer is None:  # nothing of a pass that an interrupt ended
        choice.left_behind().clear()
    choice.be_in(run)


def _end(module: nn.Module, args: tuple, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    state: State = module.__dict__[_STATE]
    run = choice.under_way()
    if state.traffic.end() and run is not None and run.state is state:
        choice.be_in(run.outer)


def _is_recorded() -> bool:
    """Whether somebody looks at every operation or module: a trace would take what is kept for constants."""
    return bool(
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
    )


class Carried:
    """A checkpointing function that runs layers again as they ran first: with the same adapters.

    Backward may come when the context that chose them is left, and on a GPU in another thread. For re-entrant
    checkpointing it also makes the input of an adapted layer need a gradient: every gradient of a layer none of whose
    inputs needs one is dropped there, and in a frozen model that is the lowest adapted one.
    """

    def __init__(self, function: Callable[..., Any], owner: nn.Module):
        self.function = function
        self.owner = owner

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = choice.under_way()
        if torch.compiler.is_compiling() or run is None:
            return self.function(layer, *args, **kwargs)

        first = True

        def again(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            if not first:
                run.require_attached()
            first = False
            with choice.passing(run):
                return layer(*args, **kwargs)

        return self.function(again, *self._with_gradient(layer, args), **kwargs)

    def _with_gradient(self, layer: Callable[..., Any], args: tuple) -> tuple:
        if not (args and torch.is_grad_enabled() and _is_adapted(layer, self.owner)):
            return args
        hidden_states = args[0]
        if not torch.is_tensor(hidden_states) or hidden_states.requires_grad:
            return args
        if not hidden_states.is_floating_point():
            return args
        return (hidden_states.detach().requires_grad_(), *args[1:])


def _is_adapted(layer: Callable[..., Any], owner: nn.Module) -> bool:
    """Whether the layer that a checkpointing function is to run holds an adapter."""
    inner = layer.func if isinstance(layer, functools.partial) else layer
    module = getattr(inner, "__self__", inner)
    module = module if isinstance(module, nn.Module) else owner
    return any(isinstance(each, Host) for each in module.modules())


def _carry_into_recomputation(model: nn.Module, state: State) -> None:
    modules = state.known.get("checkpointed")
    if modules is None:
        names = ("gradient_checkpointing", *CHECKPOINTS)
        modules = [module for module in model.modules() if any(hasattr(module, name) for name in names)]
        state.known["checkpointed"] = modules
    for module in modules:
        for name in CHECKPOINTS:
            function = module.__dict__.get(name)
            if function is not None and not isinstance(function, Carried):
                setattr(module, name, Carried(function, module))


def forget_recomputation(model: nn.Module) -> None:
    """Put the checkpointing functions back."""
    for module in model.modules():
        for name in CHECKPOINTS:
            function = module.__dict__.get(name)
            if isinstance(function, Carried):
                setattr(module, name, function.function)
