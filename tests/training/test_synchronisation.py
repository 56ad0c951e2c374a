"""How often a training step and a decoding step make the host wait for the device, counted on a CPU.

A GPU is waited for whenever a value leaves it (``item``, ``tolist``, a truth value, ``nonzero``), and whenever a
tensor of the host is copied to it without ``non_blocking``. Reading a value shows to a dispatch mode; copies are
recognised by how they are asked for, since on a CPU nothing is copied.
"""

import collections
import sys

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import fastadapter as fa
from fastadapter.training import TrainingConfig
from fastadapter.training.classification import ClassificationTask
from fastadapter.training.run import Run
from fastadapter.training.targets import AdapterTarget
from fastadapter.training.tasks import GenerationTask
from tests.training.toy import (
    make_adapted,
    make_classifier,
    make_examples,
    make_model,
    make_texts,
    make_tokenizer,
)

READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
    "aten::_unique2", "aten::unique_consecutive",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts by the package whose code asked: ``fastadapter``, ``transformers``, ``torch``."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = collections.Counter()
        plain_to, plain_tensor, plain_list = torch.Tensor.to, torch.tensor, torch.Tensor.tolist
        inside = []

        def to(tensor, *args, **kwargs):
            moves = "device" in kwargs or any(isinstance(each, (torch.device, str)) for each in args)
            if moves and not kwargs.get("non_blocking"):
                self.note("a copy with to()")
            return plain_to(tensor, *args, **kwargs)

        def make(*args, **kwargs):
            # by its name the CPU is meant, whatever the run's device is
            if kwargs.get("device", "cpu") != "cpu":
                self.note("a copy with torch.tensor()")
            return plain_tensor(*args, **kwargs)

        def tolist(tensor):
            self.note("tolist")
            inside.append(tensor)  # its own reads are the same wait
            try:
                return plain_list(tensor)
            finally:
                inside.pop()

        def cpu(tensor):
            self.note("cpu")
            return plain_to(tensor, "cpu")

        self.inside, self.watching = inside, False
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        monkeypatch.setattr(torch.Tensor, "cpu", cpu)
        monkeypatch.setattr(torch, "tensor", make)

    def note(self, what):
        if not self.watching:
            return
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            # AdamW keeps its count of steps on the host; ops look at row_ids on a CPU only
            if module.startswith(("torch.optim", "fastadapter.ops.checks")):
                return
            package = module.partition(".")[0]
            if package in ("fastadapter", "transformers"):
                self.counts[f"{package}: {what}"] += 1
                return
            frame = frame.f_back

    def __enter__(self):
        self.watching = True
        return super().__enter__()

    def __exit__(self, *args):
        self.watching = False
        return super().__exit__(*args)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in READS and not self.inside:
            self.note(name)
        return function(*args, **(kwargs or {}))

    def ours(self):
        return {key: count for key, count in self.counts.items() if key.startswith("fastadapter")}


def begin(model, task, folder, config):
    run = Run(model, task, AdapterTarget(model, "default"), config, folder, Accelerator(cpu=True))
    run.begin(False, 1000, False)
    model.train()
    return run


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["generation", "bert", "llama"])
def test_a_step_waits_once(kind, accumulate, tmp_path, monkeypatch):
    """For the loss and the norm of its gradient together; however many forward passes it has."""
    config = TrainingConfig(batch_size=4, gradient_accumulation_steps=accumulate)
    if kind == "generation":
        model, examples = make_adapted(), make_examples(16)
        task = GenerationTask(model, make_tokenizer(), examples, None, config)
    else:
        model, examples = fa.attach(make_classifier(kind), fa.LlamaAdapterConfig(3)), make_texts(16)
        task = ClassificationTask(model, make_tokenizer(), examples, None, config)
    run = begin(model, task, tmp_path, config)
    run.train_step()  # ops check themselves on their first call
    waits = Waits(monkeypatch)
    with waits:
        run.train_step()
    assert waits.ours() == {"fastadapter: tolist": 1}


METHODS = {
    "llama-adapter": fa.LlamaAdapterConfig(3),
    "v2": fa.LlamaAdapterV2Config(3),
    "prefix": fa.PrefixTuningConfig(3),
    "soft-prompt": fa.SoftPromptConfig(4),
    "houlsby": fa.BottleneckConfig(bottleneck_size=4),
    "parallel": fa.BottleneckConfig(placement="parallel", bottleneck_size=4),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["one", "rows"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_decoding_step_does_not_wait(method, mixed, monkeypatch):
    """Neither with one adapter for all rows nor with one each; what transformers does is not counted."""
    model, ids = make_model(), torch.randint(60, (2, 5))
    for name in ("one", "two"):
        fa.attach(model, METHODS[method], name)
    cache = StaticCache(config=model.config, max_cache_len=10)
    rows = fa.rows(model, ["one", "two"]) if mixed else torch.no_grad()
    with rows:
        for _ in range(2):  # the second time, what can be kept is kept
            model(ids, cache=cache, use_cache=True)
            ids = ids[:, :1]
        waits = Waits(monkeypatch)
        with waits:
            model(ids, cache=cache, use_cache=True)
    assert waits.ours() == {}
