"""Sizes of models: a table by name, the configuration of a folder, or numbers."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadapter.training.config import UserError

# Of a decoder, by the names of its configuration.
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelShape:
    """A stack of equal transformer blocks.

    Attributes:
        gated: the feed-forward part has a gate (three matrices), not two.
        rms_norm: RMSNorm as transformers computes it in fp32 step by step; else LayerNorm, one kernel.
        causal: a decoder with rotary positions and a head over the vocabulary; else an encoder without a head.
        tied: head and embedding are one matrix.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int = 0
    gated: bool = True
    rms_norm: bool = True
    causal: bool = True
    tied: bool = False

    def __post_init__(self):
        for field in SIZES:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{self.name}: {field} must be an int of at least 1, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"{self.name}: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"{self.name}: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                    f"{self.num_attention_heads}, or head_dim be given"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def linears(self) -> dict[str, list[tuple[int, int]]]:
        """Inputs and outputs of a block's matrices, by the part of the block."""
        into = [(self.hidden_size, self.intermediate_size)] * (2 if self.gated else 1)
        return {
            "qkv": [(self.hidden_size, size) for size in (self.query_size, self.kv_size, self.kv_size)],
            "out": [(self.query_size, self.hidden_size)],
            "mlp": [*into, (self.intermediate_size, self.hidden_size)],
        }

    @property
    def block_parameters(self) -> int:
        """Of a block's matrices; norms and biases are a thousandth."""
        return sum(a * b for part in self.linears().values() for a, b in part)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size if self.causal else 0

    @property
    def parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (2 if self.causal and not self.tied else 1)
        return self.num_hidden_layers * self.block_parameters + embeddings


def _decoder(
    name: str, hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, **more: Any
) -> ModelShape:
    return ModelShape(name, hidden, layers, heads, kv, inner, vocab, **more)


def _encoder(name: str, hidden: int, layers: int, heads: int, inner: int, vocab: int) -> ModelShape:
    return ModelShape(
        name, hidden, layers, heads, heads, inner, vocab, gated=False, rms_norm=False, causal=False, tied=True
    )


# From the models' published configurations.
MODELS = {
    shape.name: shape
    for shape in (
        _encoder("minilm", 384, 6, 12, 1536, 30522),
        _encoder("distilbert", 768, 6, 12, 3072, 30522),
        _encoder("bert-base", 768, 12, 12, 3072, 30522),
        _encoder("bert-large", 1024, 24, 16, 4096, 30522),
        _decoder("smollm2", 576, 30, 9, 3, 1536, 49152, tied=True),
        _decoder("smollm2-360m", 960, 32, 15, 5, 2560, 49152, tied=True),
        _decoder("smollm2-1.7b", 2048, 24, 32, 32, 8192, 49152, tied=True),
        _decoder("llama-7b", 4096, 32, 32, 32, 11008, 32000),
        _decoder("llama-13b", 5120, 40, 40, 40, 13824, 32000),
        _decoder("llama-30b", 6656, 60, 52, 52, 17920, 32000),
        _decoder("llama-65b", 8192, 80, 64, 64, 22016, 32000),
        _decoder("llama-2-70b", 8192, 80, 64, 8, 28672, 32000),
        _decoder("llama-3-8b", 4096, 32, 32, 8, 14336, 128256),
        _decoder("llama-3-70b", 8192, 80, 64, 8, 28672, 128256),
        _decoder("llama-3.2-1b", 2048, 16, 32, 8, 8192, 128256, tied=True),
        _decoder("llama-3.2-3b", 3072, 28, 24, 8, 8192, 128256, tied=True),
        _decoder("mistral-7b", 4096, 32, 32, 8, 14336, 32000),
        _decoder("qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151936, tied=True),
        _decoder("qwen2.5-7b", 3584, 28, 28, 4, 18944, 152064),
    )
}
# Families of transformers whose blocks are of one of the two forms.
_GATED = (
    "arcee granite llama ministral mistral olmo olmo2 phi3 qwen2 qwen3 smollm3 gemma gemma2 gemma3_text helium"
).split()
_PLAIN_ENCODERS = "albert bert camembert distilbert electra roberta xlm-roberta".split()


def resolve_shape(name: str) -> ModelShape:
    """The model of that name in the table, or of the folder with a ``config.json``.

    Raises: UserError: there is no such name and folder, or its blocks are of a form that is not modelled.
    """
    if name in MODELS:
        return MODELS[name]
    if (Path(name) / "config.json").is_file():
        return from_folder(name)
    raise UserError(
        f"--model {name!r} is unknown: there is {', '.join(MODELS)}; or a folder with a config.json, or the sizes: "
        "--hidden-size, --num-hidden-layers, --num-attention-heads, --intermediate-size, --vocab-size"
    )


def from_folder(folder: str) -> ModelShape:
    """The shape that a model's configuration says; transformers knows its families' names for the sizes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    kind = config.model_type
    if kind not in (*_GATED, *_PLAIN_ENCODERS):
        raise UserError(
            f"--model {folder}: {kind} has blocks that are not modelled (known: "
            f"{', '.join((*_GATED, *_PLAIN_ENCODERS))}); give the sizes of a model like it"
        )
    gated = kind in _GATED
    heads = config.num_attention_heads
    return ModelShape(
        name=Path(folder).name or kind,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        # distilbert alone has no common name for it
        intermediate_size=getattr(config, "intermediate_size", None) or config.hidden_dim,
        vocab_size=config.vocab_size,
        head_dim=getattr(config, "head_dim", None) or 0,
        gated=gated,
        rms_norm=gated,
        causal=gated,
        tied=bool(config.tie_word_embeddings) or not gated,
    )


def changed(shape: ModelShape, **sizes: int | None) -> ModelShape:
    """The shape with the sizes that are given; those that follow from them are computed anew."""
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    if not given:
        return shape
    if ("hidden_size" in given or "num_attention_heads" in given) and "head_dim" not in given:
        given["head_dim"] = 0
    return dataclasses.replace(shape, name=f"{shape.name}, other sizes", **given)
