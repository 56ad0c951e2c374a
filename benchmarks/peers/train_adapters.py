"""A Pfeiffer adapter of the library ``adapters``, as its users train it: padding to the longest, full logits.

.venv-peers/adapters/bin/python benchmarks/peers/train_adapters.py JOB.json
"""

import json
import sys
from pathlib import Path

import adapters
import common
import protocol
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    job = protocol.read_job(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    # it only pads: rows are in tokens already, and release 4 does not know the class that release 5 writes down
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(job["model"], "tokenizer.json")))
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    config = AutoConfig.from_pretrained(job["model"])
    # transformers 5 writes the base of the rotary embedding where release 4 does not look for it
    rotary = json.loads(Path(job["model"], "config.json").read_text()).get("rope_parameters") or {}
    config.rope_theta = rotary.get("rope_theta", config.rope_theta)
    model = AutoModelForCausalLM.from_pretrained(job["model"], config=config, torch_dtype=torch.float32)
    adapters.init(model)
    model.add_adapter("recipe", config=adapters.SeqBnConfig(reduction_factor=job["reduction_factor"]))
    model.train_adapter("recipe")
    common.train_by_collator(job, tokenizer, model, adapters.__version__)


if __name__ == "__main__":
    main()
