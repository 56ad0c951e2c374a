"""What counts as a block: members of a list that hold a self-attention, however the model names its parts."""

import pytest
import torch
import transformers as tf
from torch import nn

import fastadapter as fa
from fastadapter.integrations.parts.blocks import Block, blocks_of

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}


def dinov2():
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**sizes, mlp_ratio=2, image_size=16, patch_size=8))


def wav2vec2():
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    config = tf.Wav2Vec2Config(
        **SIZES, **convolutions, num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=4
    )
    return tf.Wav2Vec2ForCTC(config)


def swin():
    config = {"depths": [2, 1], "num_heads": [2, 2], "embed_dim": 8, "window_size": 2}
    return tf.SwinModel(tf.SwinConfig(image_size=16, patch_size=2, **config))


def adapted(model, **options):
    fa.attach(model, fa.LlamaAdapterConfig(prefix_len=2, **options))
    return [name.rpartition(".fa_prefix")[0] for name, _ in fa.trainable_parameters(model) if "gate" in name]


@pytest.mark.parametrize("build", [dinov2, wav2vec2])
def test_digits_in_names_are_no_blocks(build):
    """``dinov2.encoder.layer.0`` was read as block 2 of ``dinov``, so ``layers=1`` adapted every block."""
    assert len(adapted(build(), layers=1)) == 1
    assert len(adapted(build())) == 3
    with pytest.raises(ValueError, match=r"layers must be at most 3, .*\.(encoder|layer|layers).*, got 4"):
        adapted(build(), layers=4)


def test_v2_scales_what_is_inside_blocks_and_trains_the_norm_behind_them():
    """With blocks misread, V2 found no linear layer in ``dinov2``."""
    model = dinov2()
    fa.attach(model, fa.LlamaAdapterV2Config(prefix_len=2))
    names = [name for name, _ in fa.trainable_parameters(model)]
    scaled = [name for name in names if name.endswith("fa_scale.adapters.default.scale")]
    assert len(scaled) == 3 * 6
    assert any(name.startswith("dinov2.layernorm.fa_copy") for name in names)


def test_v2_trains_the_last_norm_of_a_bare_base_model():
    """Whose blocks are a list at the root: the norm behind it is a child of the model itself."""
    config = tf.LlamaConfig(**SIZES, vocab_size=32)
    for model, norm in ((tf.LlamaModel(config), "norm."), (tf.LlamaForCausalLM(config), "model.norm.")):
        fa.attach(model, fa.LlamaAdapterV2Config(prefix_len=2))
        assert any(name.startswith(f"{norm}fa_copy") for name, _ in fa.trainable_parameters(model))


class Attention(nn.Module):
    pass


def block(**parts):
    return nn.ModuleDict({"attention": Attention(), "experts": nn.ModuleList([nn.Linear(2, 2)]), **parts})


def stacks(model):
    paths = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    return list(dict.fromkeys(blocks_of(model, paths).values()))


def test_stages_of_blocks_are_one_stack():
    """A list in a list: the blocks of the later stage are the top ones."""
    stages = nn.ModuleList([nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])}) for _ in range(2)])
    model = nn.ModuleDict({"stages": stages})
    assert stacks(model) == [Block(f"stages.{i}.blocks.{j}", "stages") for i in (0, 1) for j in (0, 1)]


def test_parts_of_a_block_are_no_blocks():
    """T5 keeps attention and feed-forward of a block in a list, one block or more."""
    for count in (1, 2):
        parts = [nn.ModuleDict({"layer": nn.ModuleList([block(), nn.Linear(2, 2)])}) for _ in range(count)]
        assert stacks(nn.ModuleDict({"block": nn.ModuleList(parts)})) == [
            Block(f"block.{i}", "block") for i in range(count)
        ]


def test_layers_without_attention_and_what_is_around_the_model():
    """A hybrid's recurrent layers, a user's own Sequential around the model, a pooling head's attention."""
    hybrid = nn.ModuleList([block(), nn.Linear(2, 2), block()])
    assert stacks(nn.ModuleDict({"layers": hybrid})) == [
        Block("layers.0", "layers"),
        Block("layers.2", "layers"),
    ]
    encoder = nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "pooling": Attention()})
    assert stacks(nn.Sequential(encoder, nn.Linear(2, 2))) == [
        Block("0.layers.0", "0.layers"),
        Block("0.layers.1", "0.layers"),
    ]
    assert stacks(nn.Sequential(nn.ModuleDict({"layers": hybrid}), nn.Linear(2, 2))) == [
        Block("0.layers.0", "0.layers"),
        Block("0.layers.2", "0.layers"),
    ]
    assert stacks(nn.ModuleList([block()])) == [Block("0", "")]


@torch.no_grad()
def test_swin_counts_blocks_over_its_stages():
    model = swin().eval()
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    base = model(**inputs).last_hidden_state
    assert len(adapted(model, layers=2)) == 2
    assert torch.equal(model(**inputs).last_hidden_state, base)


def test_a_bare_attention_is_in_no_block():
    layer = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, vocab_size=32)).model.layers[0]
    with pytest.raises(TypeError, match="no list of blocks: self_attn in no ModuleList"):
        fa.attach(layer, fa.LlamaAdapterConfig(prefix_len=2))
