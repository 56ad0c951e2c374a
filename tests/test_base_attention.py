"""The attentions of torch that a prefix term is put on: what each can run, and, on a GPU, that it is right."""

import pytest
import torch

from fastadapter.ops import base_attention
from fastadapter.ops.attention import Options
from fastadapter.ops.base_attention import BASES, base_of_sdpa, choose_base
from fastadapter.ops.composed import _Rows
from tests.support.attention import SHARED, Shape, eager, make_inputs, packed
from tests.support.budget import assert_within_budget

GPU_BASES = ("cudnn", "flash", "efficient")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has these attentions on a GPU")


def operands(shape, dtype=torch.bfloat16):
    inputs = make_inputs(shape, dtype)
    return inputs.query, inputs.key, Options(*inputs.schema_options(SHARED))


def ask_again():
    """What a device can do is asked once."""
    base_attention._asked_capability.cache_clear()
    base_attention._asked_cudnn.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """What the limits ask the machine for."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ask_again()
    yield
    ask_again()


LIMITS = {
    "flash_cpu": {
        "cu_seqlens is given": packed(3, 4),
        "window or softcap is given": Shape(softcap=2.0),
        "there are no queries or no keys": Shape(kv_len=0),
    },
    "cudnn": {
        "window or cu_seqlens is given": packed(3, 4),
        "multiple of 8 up to 128, got 136": Shape(head_dim=136),
        "attn_mask is given": Shape(mask="bool"),
    },
    "flash": {
        "multiple of 8 up to 256, got 12": Shape(head_dim=12),
        "attn_mask is given": Shape(mask="float"),
        "softcap is given": Shape(softcap=2.0),
        "is_causal with q_len other than kv_len": Shape(mask="causal"),
        "there are no queries or no keys": Shape(kv_len=0),
    },
    "efficient": {
        "attn_mask is given": Shape(mask="bool"),
        "head_dim must be a multiple of 8, got 12": Shape(head_dim=12),
        "softcap is given": Shape(softcap=2.0),
        "window or cu_seqlens is given": Shape(mask="causal", window=3),
        "there are no queries or no keys": Shape(q_len=0),
    },
}


@pytest.mark.parametrize(
    ("base", "reason"), [(base, reason) for base, reasons in LIMITS.items() for reason in reasons]
)
def test_a_limit_says_what_it_is(base, reason, hopper):
    assert reason in BASES[base].limit(*operands(LIMITS[base][reason]))
    assert BASES[base].limit(*operands(Shape(head_dim=16))) is None


def test_dtypes_and_machines_are_limits(hopper, monkeypatch):
    for base in ("cudnn", "flash"):
        assert "it computes bf16 and fp16, got torch.float32" in BASES[base].limit(
            *operands(Shape(), torch.float32)
        )
    assert BASES["efficient"].limit(*operands(Shape(), torch.float32)) is None
    assert "got torch.float64" in BASES["efficient"].limit(*operands(Shape(), torch.float64))
    assert BASES["reference"].limit(*operands(packed(3, 4), torch.float64)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    ask_again()
    assert "before sm_90" in BASES["cudnn"].limit(*operands(Shape()))
    assert BASES["flash"].limit(*operands(Shape())) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    ask_again()
    assert "it needs sm_80" in BASES["flash"].limit(*operands(Shape()))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    ask_again()
    assert "it needs cuDNN 9.1" in BASES["cudnn"].limit(*operands(Shape()))


def test_what_a_device_can_do_breaks_no_graph(hopper, monkeypatch):
    """On a card a step with a prefix was no single graph: torch.compile does not look into these."""
    asked = torch.compiler.disable(lambda *device: 91000)
    monkeypatch.setattr(torch.backends.cudnn, "version", asked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", torch.compiler.disable(lambda device: (9, 0)))

    def fn(x):
        able = base_attention._cudnn_lack(x.device) is None and base_attention._capability(x.device) == 9
        return x + 1 if able else x

    assert torch.compile(fn, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]


def test_the_first_that_can_is_chosen_with_the_reasons_of_the_others():
    assert choose_base(*operands(Shape())) == ("flash_cpu", [])
    assert choose_base(*operands(packed(3, 4))) == ("reference", ["flash_cpu: cu_seqlens is given"])
    query, key, options = operands(Shape())
    assert choose_base(query.to("meta"), key, options) == ("reference", [])


def test_the_base_of_sdpa_is_what_torch_would_take():
    inputs = make_inputs(Shape(num_kv_heads=4), torch.float32)
    query, key, value = inputs.query, inputs.key, inputs.value
    assert base_of_sdpa(query, key, value, False, 0.25) == "flash_cpu"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert base_of_sdpa(query, key, value, False, 0.25) is None


def test_packed_tokens_are_rows_where_each_sequence_has_its_entry():
    inputs = make_inputs(packed(3, 0, 2, num_prefixes=3), torch.float32)
    ids = torch.tensor([2, 1, -1], dtype=torch.int32)
    rows = _Rows(inputs.query, Options(*inputs._replace(row_ids=ids).schema_options(SHARED)))
    assert rows.ids.tolist() == [2, 2, 2, -1, -1] and rows.ids.dtype == torch.int32
    assert rows.of(inputs.query).shape == (5, 4, 1, 16)
    assert torch.equal(rows.back(rows.of(inputs.query)), inputs.query)
    whole = _Rows(inputs.query, Options(*inputs._replace(row_ids=None).schema_options(SHARED)))
    assert whole.ids is None and whole.of(inputs.query) is inputs.query


CASES = [
    Shape(q_len=130, kv_len=130, head_dim=64, mask="causal"),
    Shape(q_len=70, kv_len=90, head_dim=128),
    Shape(q_len=1, kv_len=200, head_dim=64),
    Shape(q_len=70, kv_len=90, head_dim=64, mask="bool"),
    Shape(q_len=70, kv_len=90, head_dim=64, mask="float"),
    Shape(q_len=70, kv_len=93, head_dim=64, mask="float32"),
    Shape(q_len=70, kv_len=90, head_dim=64, mask="empty"),
    Shape(q_len=100, kv_len=100, head_dim=64, mask="causal", window=17),
    packed(40, 0, 65, 1, head_dim=64, mask="causal"),
    packed(40, 65, head_dim=256),
]


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("base", GPU_BASES)
def test_every_base_of_a_gpu_is_right(base, shape, dtype):
    """Grouped heads in the layout of models: output, lse and every gradient, from the output in its own strides."""
    inputs = make_inputs(shape, dtype)
    rows = len(shape.lengths) or shape.batch
    inputs = inputs._replace(row_ids=torch.full((rows,), -1, dtype=torch.int32))  # no prefix
    plain, exact = eager(SHARED, inputs, dtype), eager(SHARED, inputs, torch.float64)
    given = inputs.map(lambda x: x.cuda())
    options = Options(*given.schema_options(SHARED))
    limit = BASES[base].limit(given.query, given.key, options)
    if limit is not None:
        pytest.skip(limit)
    query, key, value, grad_out = (
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in (given.query, given.key, given.value, given.grad_out)
    )
    out, lse, state = BASES[base].forward(query, key, value, options)
    # any strides: a term that was added has those of query, a base its own
    for merged in (out, out.contiguous(), out.transpose(1, 2).contiguous().transpose(1, 2)):
        grads = BASES[base].backward(grad_out, query, key, value, merged, lse, options, state)
        for name, grad in zip(("query", "key", "value"), grads, strict=True):
            assert_within_budget(grad.cpu(), plain[name], exact[name], f"{base} {name}")
    assert_within_budget(out.cpu(), plain["out"], exact["out"], f"{base} out")
    visible = exact["lse"] != float("-inf")
    assert torch.equal(lse.cpu() != float("-inf"), visible)
    assert_within_budget(lse.cpu()[visible], plain["lse"][visible], exact["lse"][visible], f"{base} lse")
