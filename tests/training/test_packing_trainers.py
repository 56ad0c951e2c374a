"""Packed rows in transformers' Trainer and TRL's SFTTrainer: the losses are those of padded batches."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fastadapter as fa
from fastadapter.training import DataCollatorWithPacking, encode_examples
from tests.training.toy import make_examples, make_model, make_tokenizer

METHODS = {
    "llama-adapter": fa.LlamaAdapterConfig(prefix_len=3),
    "prefix": fa.PrefixTuningConfig(prefix_len=3),
    "soft-prompt": fa.SoftPromptConfig(prompt_len=3, init="random"),
    "houlsby": fa.BottleneckConfig(bottleneck_size=4),
}
ARGUMENTS = {
    "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1,
    "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 0,
}  # fmt: skip


def tokenizer():
    made = make_tokenizer()
    made.pad_token = "</s>"
    return made


def features():
    encoded = encode_examples(tokenizer(), make_examples(12, labelled=False), append_eos=True)
    return [
        {
            "input_ids": list(each.input_ids),
            "labels": [-100] * each.prompt_len + list(each.input_ids[each.prompt_len :]),
            "attention_mask": [1] * len(each.input_ids),
        }
        for each in encoded
    ]


def adapted(method):
    model = make_model()
    torch.manual_seed(1)
    return fa.attach(model, METHODS[method])


def losses(trainer):
    trainer.train()
    log = trainer.state.log_history
    return [line[key] for line in log for key in ("loss", "eval_loss") if key in line]


@pytest.mark.parametrize("method", METHODS)
def test_trainer_has_the_losses_of_padded_batches(method, tmp_path):
    found = []
    for collator in (DataCollatorForSeq2Seq(tokenizer(), padding=True), DataCollatorWithPacking()):
        arguments = TrainingArguments(output_dir=str(tmp_path), eval_strategy="epoch", **ARGUMENTS)
        found.append(
            losses(
                Trainer(
                    model=adapted(method),
                    args=arguments,
                    train_dataset=features(),
                    eval_dataset=features()[:5],
                    data_collator=collator,
                )
            )
        )
    assert len(found[0]) == 3 + 1
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=0)


def test_sft_trainer_has_the_losses_of_padded_batches(tmp_path):
    """TRL gives masks of completions instead of labels; rows that TRL packs itself are right as well."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    records = [
        {"prompt": each.prompt, "completion": each.completion} for each in make_examples(8, labelled=False)
    ]

    def trainer(collator, **options):
        settings = {
            **ARGUMENTS,
            "num_train_epochs": 1,
            "bf16": False,
            "gradient_checkpointing": False,
            **options,
        }
        return trl.SFTTrainer(
            model=adapted("prefix"),
            args=trl.SFTConfig(output_dir=str(tmp_path), max_length=64, **settings),
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer(),
            data_collator=collator,
        )

    padded = losses(trainer(None))
    assert losses(trainer(DataCollatorWithPacking())) == pytest.approx(padded, rel=1e-5, abs=0)
    packing = trainer(None, packing=True)
    batch = next(iter(packing.get_train_dataloader()))
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    starts = (positions == 0).nonzero().flatten().tolist()
    model = packing.model.eval()
    with torch.no_grad():
        together = model(ids[None], position_ids=positions[None], use_cache=False).logits[0]
        parts = ids.tensor_split(starts[1:])
        apart = torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])
    assert len(parts) > 2
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_what_the_collator_reads():
    collate = DataCollatorWithPacking()
    batch = collate(
        [
            {
                "input_ids": torch.tensor([0, 4, 5, 6]),
                "attention_mask": [0, 1, 1, 1],
                "labels": [-100, 4, -100, 6],
            },
            {"input_ids": []},
            {"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1]},
            {"input_ids": [3, 2], "assistant_masks": [1, 1]},
        ]
    )
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8, 9, 3, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 6, -100, -100, 9, -100, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 6, 8] and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_k"] == 3 and batch["use_cache"] is False


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([{"input_ids": []}, {"input_ids": [1], "attention_mask": [0]}], "must hold a token, got none in 2 examples"),
        ([], "must hold a token, got none in 0 examples"),
        ([{"input_ids": [1]}, {"input_ids": [1], "token_type_ids": [0]}], r"features\[1\] must hold some of .*'token_"),
        ([{"labels": [1]}], r"features\[0\] must hold input_ids, got labels"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"features\[0\]: labels must have 2 entries like input_ids, got 1"),
    ],
    ids=["masked", "none", "unknown", "without-tokens", "short"],
)  # fmt: skip
def test_what_the_collator_refuses(features, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPacking()(features)
