"""What README tells a reader to type, and small models under the names that it uses."""

import json
import re
import shlex
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[2]


def blocks(language, page=ROOT / "README.md"):
    """The fenced blocks of a page in that language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands():
    """Every command of the shell blocks as words, in order; comments are gone and continued lines are one."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def write_stand_ins(folder):
    """A decoder and an encoder of random weights where the command line looks before it asks for a package or a hub."""
    examples = ROOT / "examples" / "reviews.jsonl"
    (folder / "examples").mkdir(exist_ok=True)
    shutil.copy(examples, folder / "examples")
    split = pre_tokenizers.Whitespace()
    words = {word for word, _ in split.pre_tokenize_str(examples.read_text(encoding="utf-8"))}
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "?", *sorted(words - {"?"})])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    plain.pre_tokenizer = split
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)

    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=10, num_key_value_heads=2))
    encoder = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2, pad_token_id=1))
    stand_ins = {"smollm2": decoder, "HuggingFaceTB/SmolLM2-135M-Instruct": decoder, "minilm": encoder}
    for name, model in stand_ins.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def reviews(train, test):
    """Stand-ins for the reviews that come as a package."""
    rows = [{"text": f"w{i} w{i % 7}", "label": ("bad", "good")[i % 2]} for i in range(train + test)]
    return rows[:train], rows[train:]


def requirements(extra):
    """Names of what ``pip install ".[EXTRA]"`` brings."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(rf"^{extra} = (\[.*?\])", text, re.DOTALL | re.MULTILINE)
    return {re.match(r"[\w-]+", requirement)[0] for requirement in json.loads(listed.replace(",\n]", "\n]"))}
