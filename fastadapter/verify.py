"""Does an attached adapter do what it should? Catches the silent no-op."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.sharding import reshard
from fastadapter.integrations.verbs.attach import (
    adapter_modules,
    attachments,
    set_active,
    unfolded,
    unwrap,
)
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
    2. The adapter changes the outputs; an untrained one with these parts moved a little.
    3. For models that generate: greedy generation with a cache gives the logits of one full forward.
    4. An adapter that is folded into the weights: they give its outputs, up to rounding. The others are checked on it
       unfolded, and it is folded again.

    Args:
        batch: keyword arguments of the model's forward; random token ids unless given.
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
    batch = batch if batch is not None else _random_batch(model)
    if record.folded is not None:
        return _verify_folded(model, batch, name)
    parts = [
        part
        for path, module in adapter_modules(model, name).items()
        for part in _neutral(model, path, module)
    ]
    kept = [part.parameter.clone() for part in parts]
    trained = any(not torch.equal(part.parameter, part.neutral) for part in parts)
    checks = []
    with torch.random.fork_rng(devices=[]), _evaluating(model):
        try:
            set_active(model, None)
            base = _output(model, batch)
            set_active(model, name)
            if parts:
                for part in parts:
                    part.parameter.copy_(part.neutral)
                neutral = _output(model, batch)
                checks.append(
                    Check(
                        "without its effect it is the base model",
                        _same_bits(neutral, base),
                        _difference(neutral, base),
                    )
                )
                for part, value in zip(parts, kept, strict=True):
                    part.parameter.copy_(value if trained else part.moved)
            adapted = _output(model, batch)
            checks.append(
                Check("it changes the output", not _same_bits(adapted, base), _difference(adapted, base))
            )
            if getattr(model, "can_generate", lambda: False)() and "input_ids" in batch:
                checks.append(_check_generation(model, batch))
        finally:
            reshard(model)
            for part, value in zip(parts, kept, strict=True):
                part.parameter.copy_(value)
            set_active(model, name)
    return _require_passed(checks)


def _verify_folded(model: nn.Module, batch: dict[str, Any], name: str) -> list[Check]:
    with _evaluating(model):
        found = _output(model, batch)
        with unfolded(model, name):
            expected = _output(model, batch)
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


def _neutral(model: nn.Module, path: str, module: nn.Module) -> Iterator[_Part]:
    if isinstance(module, GatedPrefix):
        yield _Part(module.gate, torch.zeros_like(module.gate), torch.full_like(module.gate, 0.5))
    elif isinstance(module, Bottleneck):
        for parameter in module.up_proj.parameters():
            yield _Part(parameter, torch.zeros_like(parameter), torch.full_like(parameter, 0.1))
    elif isinstance(module, ChannelScale):
        yield _Part(module.scale, torch.ones_like(module.scale), torch.full_like(module.scale, 1.1))
        yield _Part(module.bias, torch.full_like(module.bias, -0.0), torch.full_like(module.bias, 0.1))
    elif isinstance(module, ModuleCopy):
        base = dict(model.get_submodule(path).named_parameters())
        for name, parameter in module.own.named_parameters():
            value = base[name].detach().float()
            yield _Part(parameter, value, value)


def _random_batch(model: nn.Module) -> dict[str, Tensor]:
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(
            f"batch: {type(model).__name__} takes {getattr(model, 'main_input_name', 'other inputs')}, "
            "so give the arguments of its forward"
        )
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    # Above the low ids, where special tokens such as padding and end of text live.
    ids = torch.randint(min(10, config.vocab_size - 1), config.vocab_size, (2, 8), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :4]
    return batch


def _output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    output = model(**batch)
    reshard(model)  # an adapter's parameters are written to between passes
    for field in ("logits", "last_hidden_state"):
        if getattr(output, field, None) is not None:
            return getattr(output, field)
    return output[0]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def _difference(a: Tensor, b: Tensor) -> str:
    return f"largest difference {(a.float() - b.float()).abs().max().item():.3g}"


def _check_generation(model: nn.Module, batch: dict[str, Any]) -> Check:
    inputs = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
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
        mask = inputs.get("attention_mask")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], _NEW_TOKENS - 1)], dim=1)
        full = model(input_ids=sequences[:, :-1], attention_mask=mask).logits
    # The two differ by the rounding of matrix products of other shapes, not by the adapter.
    return _check_close("cached generation is the full forward", stepwise, full[:, -_NEW_TOKENS:], model)


def _check_close(name: str, a: Tensor, b: Tensor, model: nn.Module) -> Check:
    """Whether two outputs differ by no more than rounding."""
    a, b = a.float(), b.float()
    dtype = next(model.parameters()).dtype
    tolerance = (
        64 * torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps * b.abs().max().item()
    )
    difference = (a - b).abs().max().item()
    return Check(
        name,
        difference <= tolerance,
        f"largest difference {difference:.3g}, allowed {tolerance:.3g}",
    )


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
