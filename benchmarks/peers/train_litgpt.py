"""LLaMA-Adapter of litgpt, with its chunked head and loss, padding to the longest of random batches.

litgpt keeps the projected prompt of the first step and so fails in the second; its own loop does too. The one line
that forgets it is ours.

    .venv-peers/litgpt/bin/python benchmarks/peers/train_litgpt.py JOB.json
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import common
import protocol
import torch
from litgpt.adapter import GPT, Config, mark_only_adapter_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file

CHUNK = 128  # what litgpt's own recipe hands to its head


def config_of(job: dict) -> Config:
    """From the model's own config.json: litgpt's list of names holds neither small nor new models."""
    given = json.loads(Path(job["model"], "config.json").read_text())
    rotary = given.get("rope_parameters") or {}
    layers = given["num_hidden_layers"]
    heads = given["num_attention_heads"]
    return Config(
        name="recipe",
        block_size=given["max_position_embeddings"],
        vocab_size=given["vocab_size"],
        padded_vocab_size=given["vocab_size"],
        n_layer=layers,
        n_head=heads,
        n_query_groups=given["num_key_value_heads"],
        n_embd=given["hidden_size"],
        head_size=given.get("head_dim") or given["hidden_size"] // heads,
        intermediate_size=given["intermediate_size"],
        rotary_percentage=1.0,
        rope_base=int(rotary.get("rope_theta") or given["rope_theta"]),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=given["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        adapter_prompt_length=job["prefix_len"],
        adapter_start_layer=layers - (job["layers"] or layers),
    )


def load(job: dict) -> GPT:
    config = config_of(job)
    model = GPT(config)
    files = sorted(Path(job["model"]).glob("*.safetensors"))
    weights: dict = {}
    for file in files:
        copy_weights_hf_llama(config, {}, weights, load_file(file))
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])  # tied in the checkpoint
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any("adapter" not in name and "gating" not in name for name in missing):
        raise SystemExit(f"the checkpoint does not fit litgpt: {unexpected or missing}")
    mark_only_adapter_as_trainable(model)
    return model


def main() -> None:
    job = protocol.read_job(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    model = load(job)

    def forget() -> None:
        for block in model.transformer.h:
            block.attn.adapter_kv_cache = None

    def loss_of(rows):
        forget()
        made = common.features(rows)
        ids = common.padded([row["input_ids"] for row in made], 0)
        labels = common.padded([row["labels"] for row in made], common.IGNORED)
        logits = model(ids, lm_head_chunk_size=CHUNK)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, labels[..., 1:])

    def judge():
        forget()
        return common.accuracy(job, model, model)

    pacer = protocol.Pacer(job, judge if job["held_out"] else None)
    loss = common.first_loss(job, model, loss_of)
    pacer.ready(loss, common.trainable(model), importlib.metadata.version("litgpt"))
    common.train(job, pacer, model, loss_of)


if __name__ == "__main__":
    main()
