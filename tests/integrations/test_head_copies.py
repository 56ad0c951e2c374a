"""Copies of heads under what else acts on a module: accelerate's hooks, compilers, quantisation, threads."""

import threading
import time

import pytest
import torch
from torch import nn

import fastadapter as fa
from fastadapter.nn import ModuleCopy
from tests.integrations.test_heads import METHODS, Around, classifier
from tests.support.budget import same_bits
from tests.support.models import token_ids


def test_hooks_of_accelerate_do_not_reach_the_copy():
    """They bring the weights that accelerate holds for the model to a module, which would undo the training."""
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model, ids = classifier(), token_ids()
    add_hook_to_module(model.classifier, Counting())
    fa.attach(model, METHODS["llama-adapter"])
    before = model(ids).logits
    assert Counting.calls == 1
    with torch.no_grad():
        model.classifier.fa_copy.adapters["default"].own.bias.add_(1)
    torch.testing.assert_close(model(ids).logits, before + 1)

    model = classifier()
    weights = {key: value.clone() for key, value in model.classifier.state_dict().items()}
    add_hook_to_module(model.classifier, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    with pytest.raises(TypeError, match=r"weight of Linear is offloaded by accelerate .* \(device_map\)"):
        fa.attach(model, METHODS["llama-adapter"])


@torch.no_grad()
def test_a_copy_compiles_in_one_graph():
    """The lock around an exchange of parameters is none of the graph's."""
    norm, x = nn.LayerNorm(8).to(torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16)
    own = ModuleCopy(norm)
    own.own.weight.normal_()
    assert same_bits(torch.compile(own, backend="eager", fullgraph=True)(norm, x), own(norm, x))


def test_quantised_heads_are_refused():
    class Int8(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 32, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.T.to(x.dtype)

    model = Around(classifier=Int8())
    with pytest.raises(TypeError, match=r"weight of Int8 is quantised .*torch\.int8"):
        fa.attach(model, METHODS["llama-adapter"])
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())


def test_a_copy_in_two_threads():
    """In half precision the parameters are exchanged for a call; another thread must not see or keep that."""

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

        def forward(self, x):
            time.sleep(0.02 * x[0, 0].item())
            return x * self.weight

    module = Slow()
    own, found = ModuleCopy(module), {}
    with torch.no_grad():
        own.own.weight.fill_(3)

    def call(seconds):
        found[seconds] = own(module, torch.full((2, 4), seconds, dtype=torch.bfloat16))

    threads = [threading.Thread(target=call, args=(each,)) for each in (1, 4)]
    for thread in threads:  # the second begins while the first is at it, and ends later
        thread.start()
        time.sleep(0.005)
    for thread in threads:
        thread.join()
    for seconds, output in found.items():
        assert same_bits(output, torch.full((2, 4), 3 * seconds, dtype=torch.bfloat16))
    assert isinstance(own.own.weight, nn.Parameter) and own.own.weight.dtype == torch.float32


def test_a_copy_is_rounded_once_and_not_doubled():
    """Where the dtypes agree nothing is made; otherwise not while another thread's call has its tensors in the copy."""
    from fastadapter.nn import module_copy

    norm = torch.nn.LayerNorm(8)
    own = ModuleCopy(norm)
    assert own.rounded(norm) is own.own
    half, x = torch.nn.LayerNorm(8).bfloat16(), torch.randn(2, 8).bfloat16()
    with torch.no_grad():
        own.own.weight.add_(torch.randn(8))
        expected = own(half, x)
    found = []
    with module_copy._EXCHANGING:
        thread = threading.Thread(target=lambda: found.append(own.rounded(half)))
        thread.start()
        thread.join(0.2)
        assert not found
    thread.join()
    assert {each.dtype for each in found[0].parameters()} == {torch.bfloat16}
    assert torch.equal(found[0](x), expected) and own.own.weight.dtype == torch.float32
    assert not any(each.requires_grad for each in found[0].parameters())
