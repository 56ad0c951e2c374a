"""The trunk cache: a run that begins its passes behind the frozen blocks computes what a run of whole passes does."""

import numpy as np
import pytest

from tests.training.trunk_runs import LAYERS, run

CASES = [
    *(
        (method, "llama")
        for method in ("llama-adapter", "prefix-tuning", "prefix-reparam", "bottleneck", "parallel")
    ),
    ("llama-adapter", "gpt2"),
    ("last-layers", "llama"),
    ("last-blocks", "llama"),
    ("llama-adapter", "llama-classes"),
    ("last-blocks", "llama-classes"),
    ("llama-adapter", "bert"),
    ("prefix-tuning", "bert"),
    ("bottleneck", "bert"),
    ("last-layers", "bert"),
    ("last-blocks", "bert"),
]
ABOVE = {"last-layers": 0, "last-blocks": 1, "parallel": 1}


@pytest.mark.parametrize("method, kind", CASES)
def test_a_hundred_steps_are_those_of_whole_passes(tmp_path, method, kind):
    """Other shapes of batches round otherwise; nothing else may differ."""
    options = {"max_steps": 100, "learning_rate": 0.003, "eval_strategy": "no"}
    whole = run(tmp_path / "whole", False, method, kind, **options)
    begun = run(tmp_path / "begun", tmp_path / "cache", method, kind, **options)
    assert begun.trunk_cache["blocks"] == LAYERS - ABOVE.get(method, 2) and whole.trunk_cache is None
    np.testing.assert_allclose(begun.losses, whole.losses, rtol=1e-5)
    assert begun.losses[-1] != begun.losses[0]
    for key in ("loss_before", "loss_after"):
        assert begun.eval[key] == pytest.approx(whole.eval[key], rel=1e-5)
