"""One of two processes that shard a model with FSDP2; the argument is the output folder.

Every method is trained for two steps on half of a batch each, and alone on all of it; saved, loaded into a sharded
model, verified and detached. Each process writes what it found to ``rank0.json`` or ``rank1.json``.
"""

import faulthandler
import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import fastadapter as fa
from fastadapter.checkpoints.files import read_tensors
from tests.support.methods import CONFIGS, train_a_little
from tests.support.models import FAMILIES, build, output_of, token_ids

LLAMA = next(family for family in FAMILIES if family.name == "llama")
IDS = token_ids(batch=4)
METHODS = [name for name in CONFIGS if name not in ("v2-output", "pfeiffer", "parallel-residual")]


def adapted(method):
    model = fa.attach(build(LLAMA), CONFIGS[method])
    train_a_little(model)
    for name in ("model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"):
        model.get_submodule(name).weight.requires_grad_(True)
    return model


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, ids):
    """Two steps of plain gradient descent."""
    optimizer = torch.optim.SGD([each for _, each in fa.trainable_parameters(model)], lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def largest_difference(path, other):
    one, two = read_tensors(path)[0], read_tensors(other)[0]
    assert one.keys() == two.keys() and len(one) > 1
    return max((one[key] - two[key]).abs().max().item() for key in one)


def check(method, folder):
    rank = dist.get_rank()
    alone = adapted(method)
    train(alone, IDS)
    if rank == 0:
        fa.save(alone, folder / "alone")
    dist.barrier()
    model = shard(adapted(method))
    train(model, IDS[2 * rank : 2 * rank + 2])
    fa.save(model, folder / "sharded")
    assert largest_difference(folder / "alone", folder / "sharded") < 1e-6
    with torch.no_grad():
        model = fa.load(model, folder / "alone")
        expected = output_of(alone, {"input_ids": IDS})
        torch.testing.assert_close(output_of(model, {"input_ids": IDS}), expected, rtol=1e-5, atol=1e-6)
        fa.load(model, folder / "alone")  # after a forward pass, where some parameters are whole
        torch.testing.assert_close(output_of(model, {"input_ids": IDS}), expected, rtol=1e-5, atol=1e-6)
    fa.save(model, folder / "again")
    assert largest_difference(folder / "alone", folder / "again") == 0
    checks = [str(each) for each in fa.verify(model)]
    fa.save(model, folder / "verified")
    assert largest_difference(folder / "alone", folder / "verified") == 0
    with torch.no_grad():
        fa.detach(model)  # what was trained here stays, what was loaded goes
        bare = output_of(fa.detach(alone), {"input_ids": IDS})
        torch.testing.assert_close(output_of(model, {"input_ids": IDS}), bare, rtol=1e-5, atol=1e-6)
    return checks


def refusals(folder):
    """What is said when an adapter comes too late, or the file cannot be written by the first process."""
    found = []
    sharded, wrapped = shard(build(LLAMA)), torch.nn.parallel.DistributedDataParallel(build(LLAMA))
    for model in (sharded, wrapped, AveragedModel(wrapped)):
        try:
            fa.attach(model, CONFIGS["houlsby"])
        except TypeError as error:
            found.append(str(error))
    (folder / "file").write_text("")
    try:
        fa.save(shard(adapted("houlsby")), folder / "file" / "inside")
    except fa.CheckpointError as error:
        found.append(str(error))
    return found


def beside(folder):
    """`save_pretrained` by one process alone, with the weights that all have gathered: what accelerate does."""
    model = shard(adapted("prefix"))
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    said = "all parts are here"
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=gathered)
        try:
            model.save_pretrained(folder, state_dict={})
        except ValueError as error:
            said = str(error)
    fa.save(model, folder / "own")
    return said, largest_difference(folder, folder / "own")


def main() -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # two that wait for each other say where
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    results = {}
    for method in METHODS:
        try:
            results[method] = check(method, folder / method)
        except Exception:
            results[method] = traceback.format_exc()
            break  # the other process may be elsewhere
    else:
        results["refusals"] = refusals(folder)
        results["beside"] = beside(folder / "beside")
        average = AveragedModel(torch.nn.parallel.DistributedDataParallel(adapted("houlsby")))
        fa.save(average, folder / f"average{dist.get_rank()}")
        results["average"] = list(read_tensors(folder / f"average{dist.get_rank()}")[0])
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
