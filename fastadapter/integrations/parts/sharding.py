"""Models whose parameters are spread over processes: reading and writing them whole."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.wrappers import layers_around, unwrap


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only its part of a tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor: of FSDP2 or of tensor parallelism


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; every process that holds a part of it must call this."""
    found: Any = tensor.detach()
    return found.full_tensor() if is_sharded(found) else found


def require_whole(tensors: Mapping[str, Tensor]) -> None:
    """Refuse parameters of which only a part is here, and which cannot be gathered from here.

    Raises: ValueError: FSDP (the first) or DeepSpeed's ZeRO-3 hold them flattened.
    """
    flat = [each for each in tensors.values() if getattr(each, "_fsdp_flattened", False)]
    if not tensors or (flat and all(each.dim() < 2 for each in flat)):
        raise ValueError(
            "model: FullyShardedDataParallel keeps flattened parts of the adapter's parameters; make this call in "
            "every process inside FullyShardedDataParallel.summon_full_params(model)"
        )
    for name, each in tensors.items():
        if hasattr(each, "ds_id") and not each.numel():
            raise ValueError(
                f"model: DeepSpeed keeps a part of {name} in each process; make this call in every process inside "
                "deepspeed.zero.GatheredParameters(model.parameters(), modifier_rank=0)"
            )


@torch.no_grad()
def write(target: Any, value: Tensor) -> None:
    """Put ``value``, whole and the same in every process, into a tensor, sharded or not."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        # Nothing is sent: every process takes its own part.
        value = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(value)


@contextlib.contextmanager
def all_or_none(targets: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors that are written to in the context: each is what it was if anything goes wrong there.

    Yields: what they were, whole and in main memory.
    """
    before = {name: whole(each).to("cpu", copy=True) for name, each in targets.items()}
    try:
        yield before
    except BaseException:
        for name, each in targets.items():
            write(each, before[name])
        raise


def reshard(model: nn.Module) -> None:
    """Let the parameters of ``model`` be those that the processes keep.

    After a forward pass FSDP2 leaves some modules with whole parameters, made for the pass: what is written into them
    is lost, and an optimiser that gets them trains nothing.
    """
    for module in model.modules():
        if _is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def require_open(model: nn.Module) -> None:
    """Refuse to add parameters to a model when somebody has taken stock of them already.

    Raises: TypeError: it is wrapped in DDP or FSDP, or sharded.
    """
    for module in (*layers_around(model), *unwrap(model).modules()):
        if _is_fully_sharded(module):
            kind = "fully_shard"
        elif isinstance(module, (nn.parallel.DistributedDataParallel, *_fsdp("FullyShardedDataParallel"))):
            kind = type(module).__name__
        else:
            continue
        raise TypeError(
            f"model: {kind} took the parameters that it found in {type(unwrap(model)).__name__}, and would neither "
            f"shard nor average those of an adapter that comes later: attach or load it first, then use {kind}"
        )


def _is_fully_sharded(module: nn.Module) -> bool:
    return isinstance(module, _fsdp("FSDPModule"))


def _fsdp(name: str) -> tuple[type, ...]:
    """A class of torch's FSDP; none where nobody has imported it, so that no module can be one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (getattr(fsdp, name),)
