"""What is attached to a model, which implementation runs it, and why not a faster one."""

from dataclasses import dataclass

from torch import nn

from fastadapter.integrations.transformers import attachments, hosts, unwrap
from fastadapter.ops.backends import automatic_backend

_COLUMNS = ("module", "adapter", "parameters", "base_attention", "projection", "backend", "reason")


@dataclass(frozen=True)
class Explanation:
    """The rows of :func:`explain`; ``print`` shows them as a table.

    Args:
        rows: one per adapted module and adapter, with the keys module, adapter, parameters, base_attention,
            projection, backend and reason.
    """

    rows: list[dict[str, str]]

    def __str__(self) -> str:
        if not self.rows:
            return "no adapter is attached"
        cells = [_COLUMNS, *(tuple(row[column] for column in _COLUMNS) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells
        )


def explain(model: nn.Module) -> Explanation:
    """Describe what is attached to ``model`` and how it runs.

    ``*`` marks the active adapter. ``projection`` says how the prompt becomes keys and values: by the layer's key
    and value projections alone, or, where these do not give the same bits, by the layer's own forward.

    >>> import torch
    >>> print(explain(torch.nn.Linear(2, 2)))
    no adapter is attached
    """
    model = unwrap(model)
    if attachments(model) is None:
        return Explanation([])
    rows = []
    for path, host in hosts(model).items():
        config = getattr(model.get_submodule(path), "config", None)
        for name in host.adapters:
            adapter = host.adapter(name)
            prompt = adapter.prompt
            # The op runs in the activations' dtype; the masters are fp32 whatever that is.
            dtype = getattr(model, "dtype", prompt.dtype)
            backend, reason = automatic_backend(prompt.device.type, dtype, "gated_prefix")
            rows.append(
                {
                    "module": path,
                    "adapter": name + ("*" if name == host.active else ""),
                    "parameters": str(sum(p.numel() for p in adapter.parameters())),
                    "base_attention": str(getattr(config, "_attn_implementation", "?")),
                    "projection": "key/value modules" if host.fast_projection else "layer forward",
                    "backend": backend,
                    "reason": reason,
                }
            )
    return Explanation(rows)
