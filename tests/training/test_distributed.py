"""Two processes compute what one does, from rows of uneven length: losses and evaluations to a millionth.

Not bit for bit, and weights less closely: each process sums the gradients of its own rows, in an order of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastadapter.checkpoints.files import read_tensors
from fastadapter.training import UserError
from tests.training import distributed_worker, trunk_runs
from tests.training.toy import STATE, adapter_bits, history, run


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Output folder of the two processes and what they agree on."""
    # 22 rows in steps of 5, cut into 2 processes x 2 accumulation steps: shares of 1 or 2 rows, and of none in the
    # last step of an epoch.
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*command, distributed_worker.__name__, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    locked = [rank.pop("locked") for rank in ranks]
    assert locked == [
        f"{folder / 'labels'} is in use by another run",
        "refused",
    ]  # and none waits for the other
    assert ranks[0] == ranks[1]
    return folder, ranks[0]


def flat(record):
    """The numbers of a history, one after the other."""
    if isinstance(record, dict):
        return [number for key in sorted(record) for number in flat(record[key])]
    if isinstance(record, list):
        return [number for each in record for number in flat(each)]
    return [record]


@pytest.mark.parametrize("kind", ["labels", "completions", "packed"])
def test_two_processes_equal_one(together, tmp_path, kind):
    folder, results = together
    packing = {"packing": True, "pack_length": 40} if kind == "packed" else {}
    alone = history(run(tmp_path, labelled=kind == "labels", batch_size=5, **packing))
    assert len(alone["losses"]) == 10
    assert results[kind]["losses"] == pytest.approx(alone["losses"], rel=1e-6, abs=0)
    assert flat(results[kind]) == pytest.approx(flat(alone), rel=1e-6, abs=0)
    for file in ("adapter.safetensors", "best/adapter.safetensors"):
        one, two = (read_tensors(each / file)[0] for each in (tmp_path, folder / kind))
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def test_two_processes_share_the_computation_of_a_trunk(together, tmp_path):
    alone = trunk_runs.run(tmp_path, False, batch_size=5)
    assert together[1]["computed"] == 0  # what one computed, the other did not
    assert together[1]["trunk"]["losses"] == pytest.approx(alone.losses, rel=1e-5, abs=0)
    assert not list((together[0] / "cache").rglob("*.lock"))


def test_a_signal_to_one_stops_both_and_they_resume_bit_for_bit(together):
    folder, results = together
    assert results["exit_code"] == 143
    generators = read_tensors(folder / "whole" / STATE)[0]["generator.torch"]
    assert generators.shape[0] == 2 and not torch.equal(generators[0], generators[1])
    assert results["resumed"] == results["whole"]
    assert adapter_bits(folder / "stopped") == adapter_bits(folder / "whole")


def test_folders_that_are_not_shared_are_found_out(together):
    folder, results = together
    assert results["private"].endswith("share; they found a run at the steps 10, none")
    assert not (folder / "private1").exists()


def test_another_number_of_processes_is_refused(together):
    with pytest.raises(UserError, match="num_processes was 2, now 1"):
        run(together[0] / "labels", batch_size=5, resume=True)
