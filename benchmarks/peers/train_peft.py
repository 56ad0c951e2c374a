"""PEFT's adaption prompt as its users train it: transformers' collator, padding to the longest, full logits.

python benchmarks/peers/train_peft.py JOB.json
"""

import sys

import common
import peft
import protocol
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job = protocol.read_job(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    layers = job["layers"] or model.config.num_hidden_layers
    config = peft.AdaptionPromptConfig(
        adapter_len=job["prefix_len"], adapter_layers=layers, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    common.train_by_collator(job, tokenizer, model, peft.__version__)


if __name__ == "__main__":
    main()
