"""Train PEFT's own methods on the records, seeds and rates of a comparison, and set their accuracies beside ours.

    python scripts/compare_peft.py outputs/smollm2 --out benchmarks/results/compare_smollm2/peft.json

The folder is one that ``fastadapter compare`` has filled, of a decoder. PEFT starts from initial weights of its own,
and its prompt tuning from the text that ours started from. So figures are compared by their spread over the seeds;
that the same start gives the same losses is tested apart (``tests/integrations/test_peft_parity.py``). A second call
goes on where the first one stopped.
"""

import argparse
import glob
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fastadapter  # noqa: E402
from benchmarks.comparisons import peft_table  # noqa: E402
from fastadapter.cli.loading import load_classifier  # noqa: E402
from fastadapter.compare.worker import RESULT, read_job  # noqa: E402
from fastadapter.training import TrainingConfig, class_names, finetune, read_examples, write_json  # noqa: E402

METHODS = ("prefix-tuning", "soft-prompt", "llama-adapter")


class PromptForSequenceClassification(nn.Module):
    """Rows padded on the left: behind PEFT's prompt, a decoder's head reads the last position, padding or not."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        order = attention_mask.argsort(dim=1, stable=True)
        return self.model(
            input_ids=input_ids.gather(1, order), attention_mask=attention_mask.gather(1, order)
        )


class PrefixForSequenceClassification(PromptForSequenceClassification):
    """PEFT's own call looks for ``past_key_values``, which transformers 5 no longer has; this hands its cache over."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        cache = self.model.get_prompt(len(input_ids))
        visible = attention_mask.new_ones(len(input_ids), cache.get_seq_length())
        return self.model.base_model(
            input_ids=input_ids, attention_mask=torch.cat([visible, attention_mask], dim=1), cache=cache
        )


def wrap(method: str, model: nn.Module) -> nn.Module:
    """``model`` with PEFT's form of ``method``, as large as ours, head and adapter trainable."""
    import peft

    layers = model.config.num_hidden_layers
    if method == "llama-adapter":
        config = peft.AdaptionPromptConfig(
            adapter_len=fastadapter.LlamaAdapterConfig().prefix_len,
            adapter_layers=layers,
            task_type="SEQ_CLS",
        )
        made = peft.get_peft_model(model, config)
        for name, parameter in made.named_parameters():
            if ".score." in name and "original_module" not in name:
                parameter.requires_grad_(True)
        return made
    if method == "prefix-tuning":
        length = fastadapter.PrefixTuningConfig().prefix_len
        config = peft.PrefixTuningConfig(num_virtual_tokens=length, task_type="SEQ_CLS")
        return PrefixForSequenceClassification(peft.get_peft_model(model, config))
    length = fastadapter.SoftPromptConfig().prompt_len
    config = peft.PromptTuningConfig(num_virtual_tokens=length, task_type="SEQ_CLS")
    return PromptForSequenceClassification(peft.get_peft_model(model, config))


def start_from(text: str, model: nn.Module, tokenizer: Any) -> None:
    """As PEFT's ``prompt_tuning_init="TEXT"``, which would load a tokenizer of its own from a folder or the hub."""
    [prompt] = [encoder.embedding.weight for encoder in model.model.prompt_encoder.values()]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (ids * -(-len(prompt) // len(ids)))[: len(prompt)]
    with torch.no_grad():
        prompt.copy_(model.model.get_input_embeddings().weight[ids])


def train(job: dict[str, Any], rate: float, folder: Path, text: str | None) -> dict[str, Any]:
    """One run of PEFT with the data and settings of ``job``."""
    templates = {"template": job["template"], "completion_template": "{label}"}
    records = [read_examples(job[part], **templates) for part in ("train", "test")]
    names = class_names(*records)
    model, tokenizer = load_classifier(job["model"], job["gguf_file"], job["dtype"], names, job["seed"])
    torch.manual_seed(job["seed"])
    model = wrap(job["method"], model)
    if text is not None:
        start_from(text, model, tokenizer)
    chosen = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    outcome = finetune(
        model,
        tokenizer,
        *records,
        TrainingConfig(seed=job["seed"], learning_rate=rate, **job["training"]),
        output_dir=folder,
        task="classification",
        trainable=[glob.escape(name) for name in chosen],
        resume=True,
        save_steps=200,
    )
    return {
        "accuracy": outcome.eval["accuracy_after"],
        "trainable_parameters": outcome.trainable_parameters,
        "seconds": sum(epoch["seconds"] for epoch in outcome.epochs),
        "losses": outcome.losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of fastadapter compare")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, help="of PEFT's runs; ours if not given")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every run")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for method in args.methods:
        for seed in args.seeds:
            run = args.folder / "runs" / method / f"seed-{seed}"
            mine, job = json.loads((run / RESULT).read_text()), read_job(run / "job.json")
            # the other two of PEFT have no start from a text
            text = job["options"].get("init_text") if method == "soft-prompt" else None
            start = "random" if text is None else "text"
            for rate in args.rates or [mine["learning_rate"]]:
                key = {"method": method, "seed": seed, "learning_rate": rate, "start": start}
                if any(key.items() <= row.items() for row in rows):
                    continue
                folder = args.folder / "peft" / method / f"{seed}-{rate:g}-{start}"
                found = train(job, rate, folder, text)
                rows.append({**key, "fastadapter_accuracy": mine["accuracy"], **found})
                write_json(args.out, {"rows": rows})
    print(peft_table(rows))


if __name__ == "__main__":
    main()
