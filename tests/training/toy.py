"""A small tokenizer, model, data set and run for the training tests, all made in code."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors
from fastadapter.training import Example, FinetuneResult, TrainingConfig, finetune

WORDS = [f"w{i}" for i in range(60)] + "good bad fine very Review Sentiment : <s> </s> ?".split()
CONTEXT = 64
STATE = Path("last", "training_state.safetensors")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words and punctuation, one token each."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers of random weights, large enough that an adapter can move the output."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        attention_dropout=dropout,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_adapted(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    model = make_model(seed, **options)
    torch.manual_seed(seed + 1)
    return fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3))


def make_examples(count: int, seed: int = 0, labelled: bool = True) -> list[Example]:
    """Reviews of 2 to 20 words; a good one holds more even than odd word numbers."""
    draw = random.Random(seed)
    examples = []
    for index in range(count):
        numbers = [draw.randrange(60) for _ in range(draw.randint(2, 20))]
        label = "good" if 2 * sum(n % 2 for n in numbers) < len(numbers) else "bad"
        prompt = f"Review: {' '.join(f'w{n}' for n in numbers)}\nSentiment:"
        completion = f" {label}" if labelled else f" {label} w{numbers[0]}" + " very" * (index % 3)
        examples.append(Example(prompt, completion, label if labelled else None, f"toy line {index + 1}"))
    return examples


def run(
    folder: Path,
    *,
    labelled: bool = True,
    dropout: float = 0.0,
    resume: bool = False,
    restart_schedule: bool = False,
    progress: bool = False,
    accelerator: Any = None,
    **options: Any,
) -> FinetuneResult:
    """A run of 2 epochs of 6 steps. Dropout makes it depend on the random generators."""
    examples = make_examples(32, labelled=labelled)
    options = {"num_train_epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 2, **options}
    return finetune(
        make_adapted(dropout=dropout),
        make_tokenizer(),
        examples[:22],
        examples[22:],
        TrainingConfig(**options),
        output_dir=folder,
        resume=resume,
        restart_schedule=restart_schedule,
        save_steps=2,
        progress=progress,
        accelerator=accelerator,
    )


def adapter_bits(folder: Path) -> list[dict[str, bytes]]:
    """Every weight of the final and the best adapter of a run, bit for bit."""
    files = [read_tensors(each)[0] for each in (folder, folder / "best")]
    return [{name: tensor.numpy().tobytes() for name, tensor in tensors.items()} for tensors in files]


def history(result: FinetuneResult) -> dict[str, Any]:
    """Everything a result holds that a repetition must reproduce."""
    epochs = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in result.epochs]
    return {"losses": result.losses, "epochs": epochs, "eval": result.eval}


def make_classifier(kind: str = "bert", seed: int = 0, num_labels: int = 2, dropout: float = 0.0) -> Any:
    """An encoder or a decoder of two random layers with a classification head."""
    torch.manual_seed(seed)
    if kind == "llama":
        config = LlamaConfig(
            **_SIZES,
            num_key_value_heads=2,
            attention_dropout=dropout,
            num_labels=num_labels,
            pad_token_id=None,
        )
        return LlamaForSequenceClassification(config).eval()
    config = BertConfig(
        **_SIZES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config).eval()


def make_texts(count: int, seed: int = 0) -> list[Example]:
    """The reviews of :func:`make_examples` as texts to classify."""
    return [
        Example(example.prompt, str(example.label), example.label, example.source)
        for example in make_examples(count, seed)
    ]


_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
}
