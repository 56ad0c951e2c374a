"""Runs over a model of four blocks of which the upper ones are adapted or trained, with and without a trunk cache."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import fastadapter as fa
from fastadapter.training import Example, FinetuneResult, TrainingConfig, finetune, last_layers
from tests.training.toy import CONTEXT, WORDS, make_examples, make_texts, make_tokenizer

LAYERS = 4
_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
}


def make(kind: str = "llama", seed: int = 0, dropout: float = 0.0, num_labels: int = 2) -> Any:
    """``llama`` and ``gpt2`` write, ``llama-classes`` and ``bert`` classify."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        sizes = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **sizes, **drops)).eval()
    if kind == "bert":
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = BertConfig(**_SIZES, **drops, num_labels=num_labels, pad_token_id=0)
        return BertForSequenceClassification(config).eval()
    config = LlamaConfig(**_SIZES, num_key_value_heads=2, attention_dropout=dropout, num_labels=num_labels)
    kinds = {"llama": LlamaForCausalLM, "llama-classes": LlamaForSequenceClassification}
    return kinds[kind](config).eval()


CONFIGS = {
    "llama-adapter": fa.LlamaAdapterConfig(prefix_len=3, layers=2),
    "prefix-tuning": fa.PrefixTuningConfig(prefix_len=3, layers=2),
    "prefix-reparam": fa.PrefixTuningConfig(prefix_len=3, layers=2, reparam_size=8),
    "bottleneck": fa.BottleneckConfig(reduction_factor=4, layers=2),
    "parallel": fa.BottleneckConfig(reduction_factor=4, layers=1, placement="parallel"),
}
# Blocks that are trained themselves, beside all that stands behind them.
BLOCKS = {"last-layers": 0, "last-blocks": 1}


def run(
    folder: Path,
    cache: Any,
    method: str = "llama-adapter",
    kind: str = "llama",
    *,
    model: Any = None,
    task: str | None = None,
    examples: list[Example] | None = None,
    held_out: int = 20,
    dropout: float = 0.0,
    resume: bool = False,
    save_steps: int = 50,
    progress: bool = False,
    accelerator: Any = None,
    **options: Any,
) -> FinetuneResult:
    """A run of 10 steps, of classes where the model has a head for them."""
    task = task or ("classification" if kind in ("bert", "llama-classes") else "generation")
    if examples is None:
        examples = (make_texts if task == "classification" else make_examples)(60)
    if model is None:
        model = make(kind, dropout=dropout)
        torch.manual_seed(1)
        if method in CONFIGS:
            fa.attach(model, CONFIGS[method])
    options = {"num_train_epochs": 1, "batch_size": 4, **options}
    return finetune(
        model,
        make_tokenizer(),
        examples[held_out:],
        examples[:held_out] or None,
        TrainingConfig(**options),
        output_dir=folder,
        task=task,
        trainable=last_layers(model, BLOCKS[method]) if method in BLOCKS else None,
        resume=resume,
        save_steps=save_steps,
        progress=progress,
        accelerator=accelerator,
        trunk_cache=cache,
    )


if __name__ == "__main__":  # in a process of its own, which says after each shard that it is there, and waits
    from fastadapter.training.trunk import store

    write = store.Store.write

    def slowly(self: store.Store, *of_shard: Any) -> None:
        write(self, *of_shard)
        print("shard", flush=True)
        sys.stdin.readline()

    store.Store.write, store.SHARD_SEQUENCES = slowly, 8  # type: ignore[method-assign]
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2])
