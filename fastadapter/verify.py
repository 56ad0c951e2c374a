"""Does an attached adapter do what it should? Catches the silent no-op."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.transformers import adapter_modules, attachments, set_active, unwrap

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

    1. With every gate at zero the outputs are those of the base model, bit for bit.
    2. With its gates (at 0.5 where they are all zero) the adapter changes the outputs.
    3. For models that generate: greedy generation with a cache gives the logits of one full forward.

    Args:
        batch: keyword arguments of the model's forward; random token ids unless given.
    Returns: the checks, all passed.
    Raises:
        VerificationError: naming every check that failed.
        ValueError: no adapter is active, or the model needs a ``batch`` to run.

    >>> verify(model)  # doctest: +SKIP
    """
    model = unwrap(model)
    record = attachments(model)
    if record is None or record.active is None:
        raise ValueError("model: no adapter is active on it; attach one or call set_active")
    name = record.active
    batch = batch if batch is not None else _random_batch(model)
    gates = [module.gate for module in adapter_modules(model, name).values()]
    kept = [gate.clone() for gate in gates]
    was_training = {path: module.training for path, module in model.named_modules()}
    with torch.random.fork_rng(devices=[]):
        try:
            model.eval()
            set_active(model, None)
            base = _output(model, batch)
            set_active(model, name)
            for gate in gates:
                gate.zero_()
            zeroed = _output(model, batch)
            trained = any(bool(gate.any()) for gate in kept)
            for gate, value in zip(gates, kept, strict=True):
                gate.copy_(value if trained else torch.full_like(value, 0.5))
            adapted = _output(model, batch)
            checks = [
                Check("zero gate is the base model", _same_bits(zeroed, base), _difference(zeroed, base)),
                Check(
                    "the gate changes the output", not _same_bits(adapted, base), _difference(adapted, base)
                ),
            ]
            if getattr(model, "can_generate", lambda: False)() and "input_ids" in batch:
                checks.append(_check_generation(model, batch))
        finally:
            for gate, value in zip(gates, kept, strict=True):
                gate.copy_(value)
            set_active(model, name)
            for path, module in model.named_modules():
                module.training = was_training[path]
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError("; ".join(f"{check.name}: {check.detail}" for check in failed))
    return checks


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
    full = full[:, -_NEW_TOKENS:].float()
    # The two differ by the rounding of matrix products of other shapes, not by the adapter.
    dtype = next(model.parameters()).dtype
    tolerance = (
        64 * torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps * full.abs().max().item()
    )
    difference = (stepwise - full).abs().max().item()
    return Check(
        "cached generation is the full forward",
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
