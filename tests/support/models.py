"""Randomly initialised small models of every family, and inputs for them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as tf

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GQA = {"num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """How to build one family's model and feed it; ``decoder``: generates from token ids alone."""

    name: str
    build: Callable[[], torch.nn.Module]
    decoder: bool = False
    inputs: Callable[[], dict] = field(default=lambda: {"input_ids": token_ids()})

    def __str__(self):
        return self.name


def token_ids(batch=2, length=9, seed=0):
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def _decoder(name, model, config, **options):
    return Family(name, lambda: model(config(**_SIZES, **_TOKENS, **options)), decoder=True)


def _vit():
    config = tf.ViTConfig(**{**_SIZES, "image_size": 16, "patch_size": 4})
    return tf.ViTModel(config)


def _vit_inputs():
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def _t5():
    return tf.T5EncoderModel(
        tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=64)
    )


def _whisper():
    layers = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in _WHISPER.items()}
    config = tf.WhisperConfig(
        d_model=32,
        vocab_size=64,
        max_source_positions=20,
        num_mel_bins=8,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        **layers,
        **_TOKENS,
    )
    return tf.WhisperForConditionalGeneration(config)


_WHISPER = {"layers": 3, "attention_heads": 4, "ffn_dim": 48}


def _whisper_inputs():
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": token_ids(length=5)}


def _gpt2():
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64, **_TOKENS)
    )


def _distilbert():
    return tf.DistilBertModel(
        tf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=64)
    )


# It is in transformers 5.18 and not in 5.13, where T5 is refused.
T5_IN_THE_INTERFACE = hasattr(sys.modules[tf.T5EncoderModel.__module__], "ALL_ATTENTION_FUNCTIONS")
FAMILIES = [
    _decoder("llama", tf.LlamaForCausalLM, tf.LlamaConfig, **_GQA),
    _decoder("llama-bias", tf.LlamaForCausalLM, tf.LlamaConfig, attention_bias=True, **_GQA),
    _decoder("mistral", tf.MistralForCausalLM, tf.MistralConfig, head_dim=16, sliding_window=6, **_GQA),
    _decoder("qwen3", tf.Qwen3ForCausalLM, tf.Qwen3Config, head_dim=16, **_GQA),
    _decoder("phi3", tf.Phi3ForCausalLM, tf.Phi3Config, **_GQA),
    _decoder("gemma3", tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, head_dim=16, sliding_window=6, **_GQA),
    _decoder("gpt_neox", tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig),
    Family("gpt2", _gpt2, decoder=True),
    Family("bert", lambda: tf.BertModel(tf.BertConfig(**_SIZES))),
    Family("roberta", lambda: tf.RobertaModel(tf.RobertaConfig(**_SIZES))),
    Family("distilbert", _distilbert),
    *([Family("t5-encoder", _t5)] if T5_IN_THE_INTERFACE else []),
    Family("vit", _vit, inputs=_vit_inputs),
    Family("whisper", _whisper, inputs=_whisper_inputs),
]
# Attention outside transformers' interface: they must be refused.
UNSUPPORTED = [
    Family(
        "bloom",
        lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    ),
    Family(
        "falcon",
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
        ),
    ),
    Family("linear", lambda: torch.nn.Linear(4, 4)),
]


def build(family):
    """The family's model in eval mode, with biases and norms that are not at their neutral start."""
    torch.manual_seed(0)
    model = family.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def output_of(model, inputs):
    """The model's main output."""
    output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def set_gates(model, value=0.5):
    """Give every attached gate a different non-zero value around ``value``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.copy_(value + 0.1 * torch.arange(parameter.numel()))
