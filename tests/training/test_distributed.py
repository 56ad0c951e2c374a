"""Two processes compute what one does: the same losses, evaluations and weights, from rows of uneven length."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastadapter.checkpoints.files import read_tensors
from fastadapter.training import UserError
from tests.training import distributed_worker
from tests.training.toy import STATE, history, run


def flat(record):
    """The numbers of a history, one after the other."""
    if isinstance(record, dict):
        return [number for key in sorted(record) for number in flat(record[key])]
    if isinstance(record, list):
        return [number for each in record for number in flat(each)]
    return [record]


def test_two_processes_equal_one(tmp_path):
    # 22 rows in steps of 5, cut into 2 processes x 2 accumulation steps: shares of 1 or 2 rows, and of none in the
    # last step of an epoch.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, distributed_worker.__name__, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for labelled in (True, False):
        both = tmp_path / str(labelled)
        alone = history(run(tmp_path / f"alone-{labelled}", labelled=labelled, batch_size=5))
        together = ranks[0][str(labelled)]
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-6, abs=0)
        assert flat(together) == pytest.approx(flat(alone), rel=1e-6, abs=0)
        for file in ("adapter.safetensors", "best/adapter.safetensors"):
            one, two = (read_tensors(folder / file)[0] for folder in (tmp_path / f"alone-{labelled}", both))
            for name in one:
                torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
        assert read_tensors(both / STATE)[0]["generator.torch"].shape[0] == 2
    with pytest.raises(UserError, match="num_processes was 2, now 1"):
        run(tmp_path / "True", batch_size=5, resume=True)
