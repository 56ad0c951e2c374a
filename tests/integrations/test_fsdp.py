"""Two processes with FSDP2: training equals one process; files are whole; what comes too late is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors, write_tensors
from tests.integrations import fsdp_worker
from tests.integrations.fsdp_worker import LLAMA, METHODS
from tests.support.methods import CONFIGS
from tests.support.models import build


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*command, fsdp_worker.__name__, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_training_saving_loading_and_checking_are_those_of_one_process(ranks, method):
    for found in ranks:
        assert isinstance(found[method], list) and len(found[method]) >= 2, found[method]


def test_adapters_that_come_after_sharding_are_refused(ranks):
    for sharded, wrapped, averaged, unwritten in (found["refusals"] for found in ranks):
        assert sharded.endswith("attach or load it first, then use fully_shard")
        assert wrapped == averaged and wrapped.endswith("then use DistributedDataParallel")
        assert "cannot be written" in unwritten  # in both processes, though one writes


def test_save_pretrained_gathers_and_averages_behind_ddp_are_saved(ranks):
    assert "state_dict: it lacks model." in ranks[0]["beside"][0]
    for found in ranks:
        assert found["beside"][1] == 0
        assert "base-parameter.model.embed_tokens.weight" in found["average"]


def test_a_learned_scale_saved_as_a_scalar_is_read(tmp_path):
    """FSDP2 shards no scalars, so the parameter got a dimension that older files do not have."""
    model = fa.attach(build(LLAMA), CONFIGS["parallel"])
    assert all(each.dim() for _, each in fa.trainable_parameters(model))
    path = fa.save(model, tmp_path)
    tensors, metadata = read_tensors(path)
    older = {key: each[0] * 2 if key.endswith(".scale") else each for key, each in tensors.items()}
    write_tensors(path, older, metadata)
    fa.load(model, path)
    assert {each.item() for name, each in fa.trainable_parameters(model) if name.endswith(".scale")} == {2.0}
