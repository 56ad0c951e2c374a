"""What one method must do on one family's model, whatever the family; for tests and scripts/family_table.py."""

import copy
import inspect
import warnings

import torch

import fastadapter as fa
from fastadapter.integrations.parts import discovery
from fastadapter.integrations.parts.projection import StandIn, find_projection, input_size
from tests.support.budget import same_bits
from tests.support.methods import train_a_little
from tests.support.tiny_models import output_of

_OF_POSITIONS = ("position_embeddings", "position_ids", "attention_mask", "shared_kv_states")
WITHOUT_NEUTRAL_START = (fa.PrefixTuningConfig, fa.SoftPromptConfig)


class Wrong(Exception):
    """A method that attaches and does not do what it should."""


def check_method(model, inputs, config):
    """Attach, run, train, verify and detach one method; for LLaMA-Adapter also look at the keys of its prompts.

    Raises: TypeError, ValueError: refused at attach; Wrong: attached, but it fails.
    """
    with torch.no_grad():
        base = output_of(model, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* are no linear layers")  # fused experts get no scale
        fa.attach(model, config)
    try:
        if type(config) is fa.LlamaAdapterConfig:
            check_keys(copy.deepcopy(model), inputs)
        check_effect(model, inputs, base, config)
        fa.verify(model, inputs)
    except (TimeoutError, Wrong):
        raise
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}") from error
    finally:
        fa.detach(model)
    with torch.no_grad():
        if not same_bits(output_of(model, inputs), base):
            raise Wrong("detach does not give the base's outputs back")


def check_effect(model, inputs, base, config):
    """A fresh adapter changes nothing, a moved one changes the outputs and gets finite gradients."""
    with torch.no_grad():
        fresh = output_of(model, inputs)
    if not isinstance(config, WITHOUT_NEUTRAL_START) and not same_bits(fresh, base):
        raise Wrong("a fresh adapter changes the outputs")
    train_a_little(model)
    output = output_of(model, inputs)
    if output.shape != base.shape or same_bits(output.detach(), base):
        raise Wrong("a moved adapter changes nothing")
    output.float().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in fa.trainable_parameters(model)}
    for name, grad in grads.items():
        if grad is not None and not grad.isfinite().all():
            raise Wrong(f"{name} has a gradient that is not finite")
    if not any(grad is not None and grad.abs().max() > 0 for grad in grads.values()):
        raise Wrong("no parameter has a gradient")


@torch.no_grad()
def check_keys(model, inputs):
    """A prompt's keys and values are those of the same rows as a token at position 0, in every layer."""
    fa.set_active(model, None)
    forget_scalings(model)
    for path, attention in discovery.attentions(model, None):
        rows = torch.randn(1, 3, input_size(attention, path))
        projection, found = find_projection(model, path, rows)
        for row in range(rows.shape[1]):
            at_zero = keys_at_zero(model, inputs, attention, rows[0, row])
            if projection.source is not None or at_zero is None:
                continue
            for kind, ours, its in zip(("key", "value"), (found.key, found.value), at_zero, strict=True):
                if not torch.allclose(ours[0, :, row], its, rtol=1e-3, atol=1e-5):
                    raise Wrong(f"{path}: the {kind} of a prompt is not that of a token at position 0")


def forget_scalings(model):
    """Of YaRN and others, on cosines and sines: a prompt has none."""
    for module in model.modules():
        for name in vars(module):
            if name.endswith("attention_scaling"):
                setattr(module, name, 1.0)


@torch.no_grad()
def keys_at_zero(model, inputs, attention, row):
    """Key and value, each ``(heads, head_dim)``, that a layer gives a row as the first token of a text.

    Needs an attached adapter. ``None``: the layer is not called, or not with ``(batch, seq, hidden_size)`` whose first
    position is 0.
    """
    calls = []

    def record(module, args, kwargs):
        calls.append((args, kwargs))

    handle = attention.register_forward_pre_hook(record, with_kwargs=True)
    output_of(model, inputs)
    handle.remove()
    if not calls:
        return None
    args, kwargs = calls[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.dim() != 3 or hidden.shape[2] != row.shape[0]:
        return None
    turns = kwargs.get("position_embeddings")
    turns = (turns,) if torch.is_tensor(turns) else turns or ()
    real = [turn[..., :1, :] for turn in turns if not turn.is_complex()]
    if real and not any(
        (turn == 0).all() for turn in real
    ):  # its first token stands elsewhere, or is no text
        return None
    given = hidden.clone()
    given[:, 0] = row
    captured: list = []
    for name, parameter in inspect.signature(attention.forward).parameters.items():
        if name in kwargs and parameter.default is None and name not in _OF_POSITIONS:
            kwargs = {**kwargs, name: None}  # caches, and what is added for single tokens
    if args:
        args = (given, *args[1:])
    else:
        kwargs = {**kwargs, "hidden_states": given}
    type(attention).forward(StandIn(attention, captured), *args, **kwargs)
    _, key, value, _ = captured[0]
    return key[0, :, 0], value[0, :, 0]
