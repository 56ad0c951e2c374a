"""A small tokenizer, model and data set for the training tests, all made in code."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastadapter as fa
from fastadapter.training import Example

WORDS = [f"w{i}" for i in range(60)] + [*"good bad fine very Review Sentiment : <s> </s> ?".split()]
CONTEXT = 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words and punctuation, one token each."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers of random weights."""
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
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_adapted(seed: int = 0, **options) -> LlamaForCausalLM:
    model = make_model(seed, **options)
    torch.manual_seed(seed + 1)
    return fa.attach(model, fa.LlamaAdapterConfig(prefix_len=3))


def make_examples(count: int, seed: int = 0, labelled: bool = True) -> list[Example]:
    """Reviews of 2 to 20 words; those that hold more even than odd word numbers are good."""
    draw = random.Random(seed)
    examples = []
    for index in range(count):
        numbers = [draw.randrange(60) for _ in range(draw.randint(2, 20))]
        label = "good" if 2 * sum(n % 2 for n in numbers) < len(numbers) else "bad"
        prompt = f"Review: {' '.join(f'w{n}' for n in numbers)}\nSentiment:"
        completion = f" {label}" if labelled else f" {label} {label} w{numbers[0]}"
        examples.append(Example(prompt, completion, label if labelled else None, f"toy line {index + 1}"))
    return examples


def adapter_bytes(folder: Path) -> tuple[bytes, bytes]:
    """The final and the best adapter of a run; equal bytes are equal bits of every weight."""
    file = "adapter.safetensors"
    return (folder / file).read_bytes(), (folder / "best" / file).read_bytes()
