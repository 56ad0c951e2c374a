"""Make what an adapter has put into a model's weights the model's own for good."""

from torch import nn

from fastadapter.integrations.parts.wrappers import unwrap
from fastadapter.integrations.verbs.attach import detach
from fastadapter.integrations.verbs.folding import foldable
from fastadapter.integrations.verbs.record import require_attachments, require_name
from fastadapter.integrations.verbs.undo import all_or_nothing


def settle(model: nn.Module, name: str = "default") -> None:
    """Take adapter ``name`` off and leave the weights as they are: folded into, trained beside it or loaded with it.

    There is no way back.

    Raises: ValueError: no adapter of that name, or others are attached. The model is as it was then.
    """
    inner = unwrap(model)
    record = require_attachments(inner)
    require_name(record, name)
    if len(record.configs) > 1:
        raise ValueError(f"model: {len(record.configs)} adapters are attached; detach all but {name!r}")
    with all_or_nothing(inner, record):
        if record.folded is not None:
            for place in foldable(record.places[name]):
                record.handles[place] = []  # folding removed its hooks
            record.folded = None
        record.base_originals.clear()
        detach(inner, name)
