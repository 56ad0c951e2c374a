"""What a model with bottleneck adapters keeps of their weights between calls."""

import pytest
import torch

pytest.importorskip("transformers")

import fastadapter as fa
from fastadapter.integrations.passes import bottleneck as integration
from tests.support.budget import same_bits
from tests.support.models import FAMILIES, build, token_ids


def test_rounded_weights_are_kept_in_eval(monkeypatch):
    """What a GPU multiplies in half precision is rounded once, not per call, while no gradient can be needed."""
    model = build(next(family for family in FAMILIES if family.name == "llama")).bfloat16().eval()
    fa.attach(model, fa.BottleneckConfig(bottleneck_size=4), "default")
    ups = [p for name, p in fa.trainable_parameters(model) if name.endswith("up_proj.weight")]
    with torch.no_grad():
        for up in ups:
            up.normal_()
    ids, made = token_ids(batch=2, length=5), []
    real = integration.operands

    def operands(*args, **options):
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(integration, "operands", operands)
    monkeypatch.setattr(integration, "_multiplies_rounded", lambda x: True)
    with torch.no_grad():
        first, again = model(ids).logits, model(ids).logits
        assert same_bits(first, again) and len(made) == len(ups)
        assert all(arguments["up_weight"].dtype == torch.bfloat16 for arguments in made)
        ups[0].mul_(2)
        assert not same_bits(model(ids).logits, first) and len(made) == len(ups) + 1
    model(ids).logits.sum().backward()
    assert made[-1]["up_weight"].dtype == torch.float32 and ups[0].grad.dtype == torch.float32
