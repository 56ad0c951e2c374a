"""What is attached to a model, which implementation runs it, and why not a faster one."""

from dataclasses import dataclass, field

import torch
from torch import nn

from fastadapter.integrations.parts.discovery import device_of, floating_dtype
from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.passes import frozen_parts, rotary
from fastadapter.integrations.passes.packed import packed_path
from fastadapter.integrations.passes.prefix import PrefixHost, PromptSlot
from fastadapter.integrations.passes.soft_prompt_decoder import SoftPromptHost
from fastadapter.integrations.verbs.record import attachments, hosts
from fastadapter.nn import Bottleneck, ChannelScale, GatedPrefix, ModuleCopy, PrefixTuning
from fastadapter.ops.backends import automatic_backend
from fastadapter.ops.base_attention import GPU_PRIORITY

_COLUMNS = (
    "module",
    "adapter",
    "parameters",
    "base_attention",
    "packed_rows",
    "projection",
    "backend",
    "reason",
)

# The op that each kind of adapter runs in.
_OPS: dict[type, str] = {
    Bottleneck: "bottleneck",
    GatedPrefix: "gated_prefix",
    PrefixTuning: "prefix_attention",
    PromptSlot: "prefix_attention",
}


# What the kernel of an op stands on, on a GPU.
_ON_TOP = {
    "gated_prefix": " on the output of the model's attention",
    "prefix_attention": f" merged into torch's attention ({', '.join(GPU_PRIORITY)}, else the reference)",
}


@dataclass(frozen=True)
class Explanation:
    """The rows of :func:`explain`; ``print`` shows them as a table.

    Args:
        rows: one per adapted module and adapter, with the keys module, adapter, parameters, base_attention,
            packed_rows, projection, backend and reason.
        frozen: how many of the model's own norms and feed-forwards run through our kernels, by kind.
    """

    rows: list[dict[str, str]]
    frozen: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.rows:
            return "no adapter is attached"
        cells = [_COLUMNS, *(tuple(row[column] for column in _COLUMNS) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        if self.frozen:
            counts = ", ".join(f"{count} {kind}" for kind, count in self.frozen.items())
            lines.append(f"of the frozen model, through our kernels with the same bits: {counts}")
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Describe what is attached to ``model`` and how it runs.

    ``*`` marks the active adapter. ``projection`` says how the prompt becomes keys and values: by the layer's key
    and value projections alone, or, where these do not give the same bits, by the layer's own forward; of a decoder's
    soft prompt, whether it runs apart from the text or with it. ``packed_rows`` says how attention runs over the
    sequences of a packed row: by sequence, or under a mask of the row, which computes all pairs of its tokens. Backend
    ``weights``: the adapter is folded, nothing of it runs there.

    >>> import torch
    >>> print(explain(torch.nn.Linear(2, 2)))
    no adapter is attached
    """
    model = unwrap(model)
    record = attachments(model)
    if record is None:
        return Explanation([])
    rows = []
    for path, found in hosts(model).items():
        module = model.get_submodule(path)
        for host in found:
            for name, adapter in host.adapters.items():
                device = device_of(module).type
                # The op runs in the activations' dtype; the masters are fp32 whatever that is.
                op = _OPS.get(type(adapter))
                backend, reason = "torch", "no op of its own"
                if op is not None:
                    dtype, head_dim = getattr(model, "dtype", torch.float32), getattr(module, "head_dim", 0)
                    backend, reason = automatic_backend(device, dtype, op, head_dim)
                if backend == "triton" and op in _ON_TOP:
                    reason += _ON_TOP[op]
                if record.folded is not None and isinstance(adapter, ChannelScale | ModuleCopy):
                    backend, reason = "weights", "folded into the module's own"
                projection = ""
                if isinstance(adapter, GatedPrefix):
                    projection = "key/value modules" if host.projection.by_modules else "layer forward"
                elif isinstance(adapter, PromptSlot):
                    projection = "decoder forward"
                elif isinstance(host, SoftPromptHost):
                    projection = "apart from the text" if host.apart else "with the text"
                config = getattr(module, "config", None)
                implementation = getattr(config, "_attn_implementation", None)
                packed = ""
                if isinstance(host, SoftPromptHost) and not host.apart:
                    packed = "refused"
                elif isinstance(host, PrefixHost):
                    packed = packed_path(config, device_of(module), floating_dtype(module))
                rows.append(
                    {
                        "module": path,
                        "adapter": name + ("*" if name == record.active else ""),
                        "parameters": str(sum(p.numel() for p in adapter.parameters())),
                        "base_attention": str(implementation or ""),
                        "packed_rows": packed,
                        "projection": projection,
                        "backend": backend,
                        "reason": reason,
                    }
                )
    frozen = frozen_parts.count(model)
    if turning := rotary.count(model):
        frozen["rotary embeddings"] = turning
    return Explanation(rows, frozen)
