"""What every op refuses in the same words: scalars that are no finite number, and tensors that are not strided.

A good call comes first each time, so a layout that was judged once does not let a bad one of the same shape through.
"""

import math

import pytest
import torch

from fastadapter import ops
from fastadapter.ops.bottleneck import Norm

CAUSAL = {"is_causal": True}
# Name in the message, and how a value of it is given.
SCALARS = {
    "gated_prefix": {"softmax_scale": lambda x: {"softmax_scale": x}},
    "gated_prefix_attention": {
        "softmax_scale": lambda x: {"softmax_scale": x},
        "softcap": lambda x: {"softcap": x},
    },
    "prefix_attention": {
        "softmax_scale": lambda x: {"softmax_scale": x},
        "softcap": lambda x: {"softcap": x},
    },
    "prefix_merge": {"softmax_scale": lambda x: {"softmax_scale": x}, "softcap": lambda x: {"softcap": x}},
    "bottleneck": {
        "scale": lambda x: {"scale": x},
        "norm.eps": lambda x: {"norm": Norm("layer_norm", torch.ones(8), torch.ones(8), x)},
    },
}
NOT_FINITE = (math.nan, math.inf, -math.inf, 1e39, 10**400)
NOT_NUMBERS = (True, "0.5", torch.ones(()), [1.0], 1j)


def arguments(op):
    """Tensors of a good call by name."""
    if op == "bottleneck":
        shapes = {"x": (2, 3, 8), "down_weight": (2, 4, 8), "up_weight": (2, 8, 4), "down_bias": (2, 4)}
        shapes |= {"up_bias": (2, 8), "residual": (2, 3, 8)}
    else:
        shapes = {"query": (2, 4, 3, 8), "prefix_key": (2, 2, 3, 8), "prefix_value": (2, 2, 3, 8)}
        if op in ("gated_prefix", "prefix_merge"):
            shapes = {"base": (2, 4, 3, 8), **shapes}
        if op == "prefix_merge":
            shapes["base_lse"] = (2, 4, 3)
        if op.startswith("gated"):
            shapes["gate"] = (2, 4)
        if op.endswith("attention"):
            shapes |= {"key": (2, 2, 5, 8), "value": (2, 2, 5, 8), "attn_mask": (2, 1, 3, 5)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**tensors, "row_ids": torch.tensor([1, 0], dtype=torch.int32)}


def sparse(x):
    return x.to_sparse()


def compressed(x):
    return x.to_sparse_csr() if x.dim() == 2 else x.to_sparse()


def mkldnn(x):
    return x.to_mkldnn() if x.is_floating_point() else x.to_sparse()


def nested(x):
    return torch.nested.nested_tensor(list(x))


def jagged(x):
    return torch.nested.nested_tensor(list(x), layout=torch.jagged) if x.dim() > 1 else x.to_sparse()


@pytest.mark.parametrize("op", SCALARS)
def test_scalars_are_finite_numbers(op):
    good = arguments(op)
    call = getattr(ops, op)
    call(**good)
    for name, given in SCALARS[op].items():
        if name == "norm.eps":  # a bank of norms beside the bank of weights
            good = {
                key: x[0] if x.dim() > 1 and key.endswith(("weight", "bias")) else x
                for key, x in good.items()
            }
            good["row_ids"] = None
        call(**good, **given(0.5))
        call(**good, **given(2))
        for value in NOT_FINITE:
            with pytest.raises(ValueError, match=rf"^{op}: {name} must be .*finite in fp32, got "):
                call(**good, **given(value))
        for value in NOT_NUMBERS:
            with pytest.raises(
                TypeError, match=rf"^{op}: {name} must be a float.*, got {type(value).__name__}"
            ):
                call(**good, **given(value))


@pytest.mark.parametrize("op", ["gated_prefix_attention", "prefix_attention", "prefix_merge"])
def test_a_soft_cap_is_not_too_small_for_fp32(op):
    """It would become 0, which is no cap at all."""
    for value in (0.0, -1.0, 1e-50):
        with pytest.raises(ValueError, match=f"^{op}: softcap must be positive"):
            getattr(ops, op)(**arguments(op), softcap=value)


def test_eps_is_not_negative():
    x, down, up = torch.randn(2, 8), torch.randn(3, 8), torch.randn(8, 3)
    with pytest.raises(ValueError, match=r"^bottleneck: norm\.eps must be at least 0, got -0\.1"):
        ops.bottleneck(x, down, up, norm=Norm("rms_norm", torch.ones(8), None, -0.1))


@pytest.mark.parametrize("op", ["gated_prefix_attention", "prefix_attention"])
def test_a_window_fits_an_integer(op):
    good = {name: x for name, x in arguments(op).items() if name != "attn_mask"}
    getattr(ops, op)(**good, is_causal=True, window=2**63 - 1)
    with pytest.raises(ValueError, match=rf"^{op}: window must be below 2\^63, got {2**63}"):
        getattr(ops, op)(**good, is_causal=True, window=2**63)


@pytest.mark.filterwarnings("ignore:.*(nested|[Ss]parse).*:UserWarning")
@pytest.mark.parametrize("layout", [sparse, compressed, mkldnn, nested, jagged], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", SCALARS)
def test_tensors_are_strided(op, layout):
    good = arguments(op)
    call = getattr(ops, op)
    call(**good)
    for name, x in good.items():
        with pytest.raises(
            TypeError, match=rf"^{op}: {name} must be a dense tensor \(torch\.strided\), got a "
        ):
            call(**{**good, name: layout(x)})
