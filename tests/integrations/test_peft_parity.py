"""The same losses as PEFT over 50 steps, where its method is the same map: same start, data order and optimiser."""

import pytest
import torch
import transformers as tf

import fastadapter as fa
from tests.support.models import FAMILIES, build

peft = pytest.importorskip("peft")
NAMED = {family.name: family for family in FAMILIES}
STEPS = 50


def batches():
    """Of few tokens, so that there is something to learn."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 6, (4, 8), generator=generator) for _ in range(STEPS)]


def losses(model, optimizer, loss_of):
    found = []
    for ids in batches():
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


def labels_of(ids):
    """Without the first token: behind a prompt in the embeddings PEFT predicts that too."""
    return torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)


def ours(model, ids):
    return model(ids, labels=labels_of(ids)).loss


def theirs(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels_of(ids)).loss


def compare(model, optimizer, other, other_optimizer):
    expected = losses(other, other_optimizer, theirs)
    found = losses(model, optimizer, ours)
    assert expected[-1] < expected[0]  # something was learnt
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def parameters(model):
    return [parameter for _, parameter in fa.trainable_parameters(model)]


def test_adaption_prompt():
    base = build(NAMED["llama"])
    other = peft.get_peft_model(
        build(NAMED["llama"]),
        peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    )
    model = fa.attach(
        base, fa.LlamaAdapterConfig(prefix_len=4, layers=2, gate="identity", gate_per_head=False)
    )
    start = {key: p for key, p in other.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for layer in (1, 2):
            own = model.model.layers[layer].self_attn.fa_prefix.adapters["default"]
            own.prompt.copy_(
                next(p for k, p in start.items() if f"layers.{layer}." in k and "prompt" in k)[0]
            )
    compare(
        model,
        torch.optim.AdamW(parameters(model), lr=0.02),
        other,
        torch.optim.AdamW(start.values(), lr=0.02),
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_prompt_tuning(family):
    """PEFT puts the prompt in front of the embeddings of every row; here it is run once, apart."""
    other = peft.get_peft_model(
        build(NAMED[family]), peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    )
    start = [p for p in other.parameters() if p.requires_grad]
    model = fa.attach(build(NAMED[family]), fa.SoftPromptConfig(prompt_len=5))
    with torch.no_grad():
        parameters(model)[0].copy_(start[0])
    compare(model, torch.optim.AdamW(parameters(model), lr=0.05), other, torch.optim.AdamW(start, lr=0.05))


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "right-padded"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
@torch.no_grad()
def test_prompt_tuning_of_an_encoder(family, padding):
    """Every hidden state of the text is PEFT's. Its classifier reads the prompt's first position, ours the text's."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    unknown_to_peft = {}
    if family == "DistilBert":
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}
        unknown_to_peft = {"token_dim": 32, "num_layers": 3, "num_attention_heads": 4}

    def base():
        torch.manual_seed(0)
        config = getattr(tf, f"{family}Config")(vocab_size=64, **sizes)
        return getattr(tf, f"{family}ForSequenceClassification")(config).eval()

    other = peft.get_peft_model(
        base(), peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS", **unknown_to_peft)
    ).eval()
    model = fa.attach(base(), fa.SoftPromptConfig(prompt_len=5))
    own = dict(fa.trainable_parameters(model))[f"{model.base_model_prefix}.fa_prompt.adapters.default.prompt"]
    own.copy_(other.prompt_encoder["default"].embedding.weight)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding:
        ids[1, 6:], mask[1, 6:] = model.config.pad_token_id, 0
    options = {"attention_mask": mask, "output_hidden_states": True}
    found = model(ids, **options).hidden_states
    expected = other(input_ids=ids, **options).hidden_states
    assert len(found) == len(expected) == 4
    real = mask.bool()
    for state, joined in zip(found, expected, strict=True):
        torch.testing.assert_close(state[real], joined[:, 5:][real], rtol=0, atol=1e-5)


def test_prefix_tuning():
    """PEFT moves the text up by the prefix's length and does not rotate the prefix.

    That is our map with keys turned back by as many positions; gradient descent does not see the turn, Adam would.
    """
    length = 5
    other = peft.get_peft_model(
        build(NAMED["llama"]), peft.PrefixTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")
    )
    [weight] = [p for p in other.parameters() if p.requires_grad]
    model = fa.attach(build(NAMED["llama"]), fa.PrefixTuningConfig(prefix_len=length))
    decoder = model.model
    cos, sin = decoder.rotary_emb(torch.zeros(1, 1, 32), torch.tensor([[-length]]))
    with torch.no_grad():
        # (length, 2 * layers, heads, head_dim): key and value of every layer in turn
        table = weight.detach().view(length, 6, 2, 8).permute(1, 2, 0, 3)
        for layer in range(3):
            own = decoder.layers[layer].self_attn.fa_prefix.adapters["default"]
            key = table[2 * layer]
            half = torch.cat([-key[..., 4:], key[..., :4]], dim=-1)
            own.key.copy_((key * cos[0, 0] + half * sin[0, 0])[None])
            own.value.copy_(table[2 * layer + 1][None])
    compare(model, torch.optim.SGD(parameters(model), lr=0.5), other, torch.optim.SGD([weight], lr=0.5))
