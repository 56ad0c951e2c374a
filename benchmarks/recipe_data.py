"""What the parties of the recipe train on: real reviews in tokens, or a handful of made-up ones for ``--quick``."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastadapter.cli import assets
from fastadapter.training import Example, encode_examples, label_completions, read_examples

from . import models
from .runner import Settings

if TYPE_CHECKING:
    from .recipe import Recipe, Sizes

SETTINGS = {
    # LLaMA-Adapter's own training code has 0.009
    "learning_rate": 0.01,
    "weight_decay": 0.02,
    "betas": [0.9, 0.95],
    "warmup_ratio": 0.1,
    "max_grad_norm": 1.0,
    "batch_size": 16,
    "prefix_len": 10,
    "reduction_factor": 16,
    "seed": 0,
}


def make_job(
    recipe: "Recipe", sizes: "Sizes", settings: Settings, folder: Path, *, measure_memory: bool
) -> dict[str, Any]:
    """Tokens and settings, the same for all; the records are also a file, for ours to read as users do."""
    if settings.quick:
        model = small_model(folder / "model")
        reviews = small_reviews(sizes.records + sizes.held_out)
        train, held_out = reviews[: sizes.records], reviews[sizes.records :]
    else:
        model = assets.fetch_demo_model()
        train, held_out = assets.split_reviews(assets.fetch_demo_reviews(), sizes.records, sizes.held_out)
    tokenizer = AutoTokenizer.from_pretrained(model)
    records, examples = _written(folder / "train.jsonl", train)
    encoded = encode_examples(tokenizer, examples)
    names = list(label_completions(examples))
    tested = _written(folder / "held_out.jsonl", held_out)[1] if held_out else []
    rows = encode_examples(tokenizer, tested) if tested else []
    completions = {
        example.label: list(each.input_ids[each.prompt_len :]) for each, example in zip(encoded, examples)
    }
    steps = -(-sizes.records // SETTINGS["batch_size"])
    return {
        **SETTINGS,
        "model": str(model),
        "records": str(records),
        "train": [{"input_ids": list(each.input_ids), "prompt_len": each.prompt_len} for each in encoded],
        "held_out": [
            {"prompt_ids": list(each.input_ids[: each.prompt_len]), "label": names.index(example.label)}
            for each, example in zip(rows, tested, strict=True)
        ],
        "labels": [completions[name] for name in names],
        "num_train_epochs": sizes.epochs,
        "turn_steps": -(-steps // sizes.turns),
        "threads": torch.get_num_threads(),
        "layers": 1 if settings.quick and recipe.layers else recipe.layers,
        "method": recipe.method,
        "measure_memory": measure_memory,
    }


def _written(path: Path, rows: Sequence[dict[str, Any]]) -> tuple[Path, list[Example]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, read_examples(path)


WORDS = ["Review", ":", "Sentiment", "positive", "negative", "?", "</s>", *(f"w{i}" for i in range(40))]


def small_model(folder: Path) -> Path:
    """A folder with a model of two layers and a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizers
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "num_hidden_layers": 2, "hidden_size": 36, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(**{**models.SMOLLM2_135M, **sizes})).save_pretrained(folder)
    words = Tokenizer(tokenizers.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="?")
    tokenizer.save_pretrained(folder)
    return folder


def small_reviews(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "text": " ".join(f"w{draw.randrange(40)}" for _ in range(draw.randint(2, 8))),
            "label": ("positive", "negative")[index % 2],
        }
        for index in range(count)
    ]
