"""Does an attached adapter do what it should? Catches the silent no-op."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastadapter.integrations.parts.heads import own_parameters
from fastadapter.integrations.parts.inputs import random_batch
from fastadapter.integrations.parts.sharding import is_sharded, reshard
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes.host import host_of
from fastadapter.integrations.passes.soft_prompt_decoder import SoftPromptHost, difference
from fastadapter.integrations.verbs.fold import unfolded
from fastadapter.integrations.verbs.record import adapter_modules, attachments
from fastadapter.nn import Bottleneck, ChannelScale, GatedPrefix, ModuleCopy

_NEW_TOKENS = 4


class VerificationError(RuntimeError):
    """A check of :func:`verify` failed; the message names each that did."""


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, whether it held, and the figure behind it."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.detail}"


@torch.no_grad()
def verify(model: nn.Module, batch: dict[str, Any] | None = None) -> list[Check]:
    """Check the active adapter on ``model`` and leave everything as it was.

    1. With what carries its effect switched off (gates, up projections and biases at zero, scales at one, norms and
       heads as the model's) the outputs are those of the base model, bit for bit. Prefixes and soft prompts have no
       such state, so they are not checked for it.
    2. The adapter changes the outputs, with norms and heads as the model's; an untrained one with its parts moved a
       little.
    3. A decoder's soft prompt gives what the model gives on joined embeddings, up to rounding.
    4. Its copies of norms, heads and named modules change the outputs too, and none is passed over by a model that
       reads the weights of the module instead of calling it.
    5. For models that generate: greedy generation with a cache gives the logits of one full forward.
    6. An adapter that is folded into the weights: they give its outputs, up to rounding. The others are checked on it
       unfolded, and it is folded again.

    Args:
        batch: keyword arguments of the model's forward; random token ids, pixels or sound unless given.
    Returns: the checks, all passed.
    Raises:
        VerificationError: naming every check that failed.
        ValueError: no adapter is active, or the model needs a ``batch`` to run.

    >>> verify(model)  # doctest: +SKIP
    """
    model = unwrap(model)
    reshard(model)
    record = attachments(model)
    if record is None or record.active is None:
        raise ValueError("model: no adapter is active on it; attach one or call set_active")
    name = record.active
    drawn = batch is None
    batch = random_batch(model) if batch is None else batch
    if record.folded is not None:
        return _verify_folded(model, batch, name)
    modules = adapter_modules(model, name)
    copies = {path: module for path, module in modules.items() if isinstance(module, ModuleCopy)}
    effect = [part for module in modules.values() for part in _neutral(module)]
    copied = [part for path, module in copies.items() for part in _as_the_models(model, path, module)]
    parts = [*effect, *copied]
    checks = []
    with torch.random.fork_rng(devices=[]), _evaluating(model), _kept(parts):
        effect_as_is, copied_as_is = _with_effect(effect), _with_effect(copied)
        with record.state.only(None):
            called: set[str] = set()
            with _noting_calls(model, copies, called):
                base = _outputs_of_drawn(model, batch) if drawn else _outputs(model, batch)
            unread = copies.keys() - called
            bypassed = [
                path for path in sorted(unread) if _reads(model, model.get_submodule(path), batch, base)
            ]
        with record.state.only(name):
            _write(copied, [part.neutral for part in copied])
            if effect:
                _write(effect, [part.neutral for part in effect])
                neutral = _outputs(model, batch)
                what = "without its effect it is the base model"
                checks.append(Check(what, _same(neutral, base), _difference(neutral, base)))
                _write(effect, effect_as_is)
            adapted = _outputs(model, batch)
            checks.append(
                Check("it changes the output", not _same(adapted, base), _difference(adapted, base))
            )
            checks += _check_prompts(model, name)
            if copies:
                _write(copied, copied_as_is)
                checks.append(_check_copies(adapted, _outputs(model, batch), bool(called), bypassed, unread))
            if getattr(model, "can_generate", lambda: False)() and "input_ids" in batch:
                checks.append(_check_generation(model, batch))
    return _require_passed(checks)


def _check_prompts(model: nn.Module, name: str) -> list[Check]:
    found = []
    for decoder in model.modules():
        host = host_of(decoder, SoftPromptHost)
        if isinstance(host, SoftPromptHost) and name in host.adapters:
            if is_sharded(next(host.adapter(name).parameters())):
                continue  # the model itself runs prompt and text there
            far, allowed = difference(decoder, name)
            detail = f"largest difference {far:.3g}, allowed {allowed:.3g}"
            found.append(Check("its soft prompt is joined embeddings", far <= allowed, detail))
    return found


def _check_copies(
    before: list[Tensor], after: list[Tensor], called: bool, bypassed: list[str], unread: set[str]
) -> Check:
    detail = _difference(after, before)
    if bypassed:
        detail += (
            f"; the model reads the weights of {', '.join(bypassed)} without calling it, so no copy can act"
        )
    elif unread:
        detail += f"; this batch does not reach {', '.join(sorted(unread))}"
    passed = not bypassed and not (called and _same(after, before))
    return Check("its copies of the model's modules act", passed, detail)


def _verify_folded(model: nn.Module, batch: dict[str, Any], name: str) -> list[Check]:
    with _evaluating(model):
        found = _outputs(model, batch)
        with unfolded(model, name):
            expected = _outputs(model, batch)
            checks = verify(model, batch)
    return checks + _require_passed([_check_close("folded weights give its outputs", found, expected, model)])


def _require_passed(checks: list[Check]) -> list[Check]:
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError("; ".join(f"{check.name}: {check.detail}" for check in failed))
    return checks


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = {path: module.training for path, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for path, module in model.named_modules():
            module.training = was_training[path]


class _Part(NamedTuple):
    """A parameter that carries an adapter's effect: its value without effect, and one with some."""

    parameter: Tensor
    neutral: Tensor
    moved: Tensor


def _neutral(module: nn.Module) -> Iterator[_Part]:
    """What carries the effect of an adapter's module, if it can be switched off."""
    if isinstance(module, GatedPrefix):
        yield _Part(module.gate, torch.zeros_like(module.gate), torch.full_like(module.gate, 0.5))
    elif isinstance(module, Bottleneck):
        for parameter in module.up_proj.parameters():
            yield _Part(parameter, torch.zeros_like(parameter), torch.full_like(parameter, 0.1))
    elif isinstance(module, ChannelScale):
        yield _Part(module.scale, torch.ones_like(module.scale), torch.full_like(module.scale, 1.1))
        yield _Part(module.bias, torch.full_like(module.bias, -0.0), torch.full_like(module.bias, 0.1))


def _as_the_models(model: nn.Module, path: str, copy: ModuleCopy) -> Iterator[_Part]:
    base = model.get_submodule(path)
    for name, parameter in copy.own.named_parameters():
        value = base.get_parameter(name).detach().float()
        yield _Part(parameter, value, value + 0.1)
    for name, buffer in copy.statistics().items():
        value = base.get_buffer(name).to(buffer.dtype)
        yield _Part(buffer, value, value)


def _with_effect(parts: list[_Part]) -> list[Tensor]:
    """The values that parts have where one of them was trained; else those that have an effect."""
    trained = any(not torch.equal(part.parameter, part.neutral) for part in parts)
    return [part.parameter.clone() if trained else part.moved for part in parts]


def _write(parts: list[_Part], values: list[Tensor]) -> None:
    for part, value in zip(parts, values, strict=True):
        part.parameter.copy_(value)


@contextlib.contextmanager
def _kept(parts: list[_Part]) -> Iterator[None]:
    values = [part.parameter.clone() for part in parts]
    try:
        yield
    finally:
        _write(parts, values)


@contextlib.contextmanager
def _noting_calls(model: nn.Module, paths: Iterable[str], called: set[str]) -> Iterator[None]:
    def note(path: str, *args: Any) -> None:
        called.add(path)

    handles = [
        model.get_submodule(path).register_forward_hook(functools.partial(note, path)) for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reads(model: nn.Module, module: nn.Module, batch: dict[str, Any], base: list[Tensor]) -> bool:
    """Whether a model whose outputs are ``base`` depends on a module's own weights."""
    own = [parameter for _, parameter in own_parameters(module)]
    kept = [parameter.clone() for parameter in own]
    try:
        for parameter in own:
            parameter.add_(1)
        return not _same(_outputs(model, batch), base)
    finally:
        for parameter, value in zip(own, kept, strict=True):
            parameter.copy_(value)


def _outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Every tensor that a model gives; the loss, too, where there are labels."""
    output = model(**batch)
    reshard(model)  # an adapter's parameters are written to between passes
    found = [each for each in tree_leaves(output) if torch.is_tensor(each) and each.is_floating_point()]
    if not found:
        raise ValueError(f"batch: {type(model).__name__} gives no tensors for it, so nothing can be compared")
    return found


def _outputs_of_drawn(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """What the base model gives for a random batch; where it gives none, it is not the adapter's fault."""
    try:
        return _outputs(model, batch)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"batch: {type(model).__name__} does not take a random one of {', '.join(batch)} ({error}); give the "
            "arguments of its forward"
        ) from error


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(_same_bits, a, b))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a_bytes, b_bytes = (each.reshape(-1).contiguous().view(torch.uint8) for each in (a, b))
    return a.shape == b.shape and torch.equal(a_bytes, b_bytes)


def _difference(a: list[Tensor], b: list[Tensor]) -> str:
    if [each.shape for each in a] != [each.shape for each in b]:
        return "outputs of other shapes"
    largest = max((x.float() - y.float()).abs().max().item() for x, y in zip(a, b, strict=True) if x.numel())
    return f"largest difference {largest:.3g}"


def _check_generation(model: nn.Module, batch: dict[str, Any]) -> Check:
    inputs = {
        key: value for key, value in batch.items() if not key.startswith("decoder_") and key != "labels"
    }
    with _greedy(model):
        generated = model.generate(
            **inputs,
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    stepwise = torch.stack(generated.logits, dim=1).float()
    sequences = generated.sequences
    if model.config.is_encoder_decoder:
        full = model(**inputs, decoder_input_ids=sequences[:, :-1]).logits
    else:
        full = model(**_longer(inputs, sequences[:, :-1])).logits
    # The two differ by the rounding of matrix products of other shapes, not by the adapter.
    what = "cached generation is the full forward"
    return _check_close(what, [stepwise], [full[:, -_NEW_TOKENS:]], model)


def _longer(inputs: dict[str, Any], sequences: Tensor) -> dict[str, Any]:
    """The inputs of a whole generated text: what else was given (pixels) as it is, what is by token for all tokens."""
    ids = inputs["input_ids"]
    added = sequences.shape[1] - ids.shape[1]
    longer = dict(inputs, input_ids=sequences)
    for key, value in inputs.items():
        if key == "input_ids" or not torch.is_tensor(value) or value.shape != ids.shape:
            continue
        if key == "position_ids":
            more = value[:, -1:] + torch.arange(1, added + 1, device=value.device)
        elif key == "attention_mask":
            more = value.new_ones(len(value), added)
        else:  # the type of a token: what is generated is text
            more = value.new_zeros(len(value), added)
        longer[key] = torch.cat([value, more], dim=1)
    return longer


def _check_close(name: str, a: list[Tensor], b: list[Tensor], model: nn.Module) -> Check:
    """Whether outputs differ by no more than rounding; the figures are those of the worst."""
    dtype = next(model.parameters()).dtype
    epsilon = 64 * torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps
    worst = (0.0, 0.0)
    for x, y in zip(a, b, strict=True):
        difference = (x.float() - y.float()).abs().max().item()
        allowed = epsilon * y.float().abs().max().item()
        worst = max(worst, (difference, allowed), key=lambda each: each[0] - each[1])
    return Check(name, worst[0] <= worst[1], f"largest difference {worst[0]:.3g}, allowed {worst[1]:.3g}")


@contextlib.contextmanager
def _greedy(model: nn.Module):
    """Silence sampling settings of the model's own generation config, which greedy search does not use."""
    config = model.generation_config
    kept = {key: getattr(config, key, None) for key in ("temperature", "top_p", "top_k")}
    for key in kept:
        setattr(config, key, None)
    try:
        yield
    finally:
        for key, value in kept.items():
            setattr(config, key, value)
