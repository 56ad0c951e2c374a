"""Every method trains under autocast and on half-precision bases, whatever dtypes meet in a layer."""

import pytest
import torch

import fastadapter as fa
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, output_of

QUICK = ("llama", "qwen3", "gemma3", "gpt2", "bert", "t5-encoder", "vit")
REFUSED = {("soft-prompt", "t5-encoder"), ("soft-prompt", "whisper")} | {
    (name, "whisper") for name in ("houlsby", "pfeiffer", "parallel", "parallel-residual")
}
HALVES = [torch.bfloat16, torch.float16]

every_method = pytest.mark.parametrize("name", CONFIGS)
every_family = pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if each.name in QUICK else pytest.mark.slow) for each in FAMILIES],
    ids=str,
)


def adapted(family, name, dtype=torch.float32):
    if (name, family.name) in REFUSED:
        pytest.skip("not defined for this model")
    model = build(family).to(dtype)  # in eval mode: dropout would hide what rounding does
    fa.attach(model, CONFIGS[name])
    train_a_little(model)
    return model


def step(model, inputs, scaler=None):
    """One training step; whether every adapter's parameter got a finite gradient."""
    optimizer = torch.optim.SGD([p for _, p in fa.trainable_parameters(model)], lr=1e-3)
    output = output_of(model, inputs)
    loss = output.float().square().mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    grads = {key: p.grad for key, p in fa.trainable_parameters(model)}
    assert all(grad is None or torch.isfinite(grad).all() for grad in grads.values())
    assert sum(grad is not None and bool(grad.abs().max() > 0) for grad in grads.values()) > len(grads) // 2
    return output.detach().float()


@pytest.mark.parametrize("half", HALVES, ids=["bf16", "fp16"])
@every_method
@every_family
def test_under_autocast(family, name, half):
    """Near fp32, with a gradient scaler for fp16."""
    model = adapted(family, name)
    plain = output_of(model, family.inputs()).detach()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if half == torch.float16 else None
    with torch.autocast("cpu", half):
        found = step(model, family.inputs(), scaler)
    assert (found - plain).abs().max() <= 0.06 * max(1.0, plain.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("half", HALVES, ids=["bf16", "fp16"])
@every_method
@every_family
def test_a_half_precision_base(family, name, half, autocast):
    model = adapted(family, name, half)
    inputs = {
        key: value.to(half) if value.is_floating_point() else value for key, value in family.inputs().items()
    }
    assert all(p.dtype == torch.float32 for _, p in fa.trainable_parameters(model))
    with torch.autocast("cpu", half, enabled=autocast):
        fa.set_active(model, None)
        try:
            with torch.no_grad():
                output_of(model, inputs)
        except RuntimeError as error:
            assert autocast  # torch has no norm of these dtypes on a CPU
            pytest.skip(f"the base itself: {error}")
        fa.set_active(model, "default")
        step(model, inputs)
