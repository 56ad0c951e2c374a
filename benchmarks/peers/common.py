"""What the parties that are PyTorch models have in common: random batches, their padding, the optimiser, the judge."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # of a label


def random_batches(job: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Rows of every step: shuffled anew in every epoch and cut, as a data loader does it."""
    order = random.Random(job["seed"])
    for _ in range(job["num_train_epochs"]):
        rows = list(job["train"])
        order.shuffle(rows)
        for start in range(0, len(rows), job["batch_size"]):
            yield rows[start : start + job["batch_size"]]


def features(rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """For a collator of transformers: tokens, and labels that are ignored over the prompt."""
    return [
        {
            "input_ids": row["input_ids"],
            "labels": [IGNORED] * row["prompt_len"] + row["input_ids"][row["prompt_len"] :],
        }
        for row in rows
    ]


def padded(rows: list[list[int]], value: int) -> Tensor:
    """On the right, to the longest."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def optimizer_of(
    model: nn.Module, job: dict[str, Any]
) -> tuple[torch.optim.Optimizer, Any, list[nn.Parameter]]:
    """AdamW and a cosine after a warm-up, with the settings of the job; and what is trained."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=job["learning_rate"], betas=tuple(job["betas"]), weight_decay=job["weight_decay"]
    )
    total = -(-len(job["train"]) // job["batch_size"]) * job["num_train_epochs"]
    warmup = max(1, round(job["warmup_ratio"] * total))
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1 or 1)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warmup))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], [warmup])
    return optimizer, schedule, trained


def train(
    job: dict[str, Any], pacer: Any, model: nn.Module, loss_of: Callable[[list[dict[str, Any]]], Tensor]
) -> None:
    """The loop: loss, backward, clipping, AdamW; ``loss_of`` a batch is the party's own."""
    optimizer, schedule, trained = optimizer_of(model, job)
    model.train()
    pacer.first_step()
    for rows in random_batches(job):
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        pacer.step(sum(len(row["input_ids"]) for row in rows), loss.item())
    pacer.finish()


def train_by_collator(job: dict[str, Any], tokenizer: Any, model: Any, version: str) -> None:
    """All of a party that is a model of transformers: its collator pads to the longest, its loss takes full logits."""
    # what litgpt's party does without
    import protocol
    from transformers import DataCollatorForSeq2Seq

    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, padding="longest")

    def loss_of(rows):
        return model(**collate(features(rows)), use_cache=False).loss

    def judge():
        return accuracy(job, model, lambda ids: model(input_ids=ids, use_cache=False).logits)

    pacer = protocol.Pacer(job, judge if job["held_out"] else None)
    pacer.ready(first_loss(job, model, loss_of), trainable(model), version)
    train(job, pacer, model, loss_of)


@torch.no_grad()
def accuracy(job: dict[str, Any], model: nn.Module, logits_of: Callable[[Tensor], Tensor]) -> float:
    """Share of held-out rows whose label's first token is likelier than that of every other label.

    ``logits_of`` token ids padded on the right; attention looks back only, so no token sees padding.
    """
    was_training = model.training
    model.eval()
    first = torch.tensor([label[0] for label in job["labels"]])
    rows = sorted(job["held_out"], key=lambda row: len(row["prompt_ids"]))
    right = 0
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        last = torch.tensor([len(row["prompt_ids"]) - 1 for row in part])
        logits = logits_of(padded([row["prompt_ids"] for row in part], 0))
        chosen = logits[torch.arange(len(part)), last][:, first].argmax(-1)
        right += int((chosen == torch.tensor([row["label"] for row in part])).sum())
    model.train(was_training)
    return right / len(rows)


@torch.no_grad()
def first_loss(
    job: dict[str, Any], model: nn.Module, loss_of: Callable[[list[dict[str, Any]]], Tensor]
) -> float:
    """Of the first rows, before training: every party must find the same."""
    model.eval()
    return loss_of(job["train"][: job["batch_size"]]).item()


def trainable(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad)
