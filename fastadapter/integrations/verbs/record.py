"""What is attached to a model: a record on the model itself, and how to look things up in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.parts.wrappers import RECORD, unwrap
from fastadapter.integrations.passes.bottleneck import Watch
from fastadapter.integrations.passes.choice import State
from fastadapter.integrations.passes.host import Host, Place, host_of
from fastadapter.integrations.passes.shortcut import Handle
from fastadapter.integrations.verbs.folding import Folded
from fastadapter.integrations.verbs.save_pretrained import Hold
from fastadapter.methods import MethodConfig


@dataclass
class Attachments:
    """What is attached to one model: configurations by name, and what was trainable before the first.

    Attributes:
        entries: hooks where passes begin, by the path of the module.
        about: what the files of an adapter say of its origin, by its name.
    """

    configs: dict[str, MethodConfig] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    was_trainable: dict[str, bool] = field(default_factory=dict)
    handles: dict[Place, Sequence[Handle]] = field(default_factory=dict)
    watches: dict[tuple[str, Place], list[Watch]] = field(default_factory=dict)
    entries: dict[str, list[RemovableHandle]] = field(default_factory=dict)
    state: State = field(default_factory=State)
    folded: Folded | None = None
    # The model's own parameters that loading an adapter wrote to, as they were, in main memory.
    base_originals: dict[str, Tensor] = field(default_factory=dict)
    hold: Hold | None = None
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def active(self) -> str | None:
        """The adapter that acts on every row of a call from this context."""
        chosen = self.state.chosen()
        return self.state.default if chosen is None else chosen.active

    def copied(self) -> "Attachments":
        """The same, to go back to: what verbs change is copied, the state with what is in it stays."""
        copies: dict[str, Any] = {
            name: dict(value) for name, value in self.__dict__.items() if isinstance(value, dict)
        }
        return replace(self, **copies)


def attachments(model: nn.Module) -> Attachments | None:
    """The record of what is attached to ``model``, if anything is."""
    return getattr(unwrap(model), RECORD, None)


def hosts(model: nn.Module) -> dict[str, list[Host]]:
    """What carries adapters in ``model``, by the dotted path of the adapted module."""
    found = {
        path: [child for child in module.children() if isinstance(child, Host)]
        for path, module in unwrap(model).named_modules()
    }
    return {path: each for path, each in found.items() if each}


def adapter_modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules of adapter ``name`` that hold parameters, by the dotted path of the module they are in.

    Raises: ValueError: no adapter of that name.
    """
    model = unwrap(model)
    record = require_attachments(model)
    require_name(record, name)
    found = {
        path: host_of(model.get_submodule(path), kind).adapter(name) for path, kind in record.places[name]
    }
    return {path: module for path, module in found.items() if any(True for _ in module.parameters())}


def require_attachments(model: nn.Module) -> Attachments:
    record = attachments(model)
    if record is None:
        require_no_part(model)
        raise ValueError("model: no adapter is attached to it")
    return record


def require_no_part(model: nn.Module) -> None:
    """Raises: ValueError: adapters act in ``model`` that are attached to a module around it."""
    if any(isinstance(module, Host) for module in model.modules()):
        raise ValueError(
            f"model: this {type(model).__name__} is a part of a model that adapters are attached to; pass that model"
        )


def require_name(record: Attachments, name: str) -> str:
    if name not in record.configs:
        raise ValueError(
            f"name: no adapter {name!r} is attached; there is {', '.join(record.configs) or 'none'}"
        )
    return name


def require_unfolded(record: Attachments | None, unless: str | None = None) -> None:
    """Refuse what would act on weights that hold an adapter as if they were the base model's.

    Raises: ValueError: the weights hold an adapter other than ``unless``.
    """
    if record is not None and record.folded is not None and record.folded.name != unless:
        raise ValueError(
            f"model: its weights hold adapter {record.folded.name!r}, folded; unfold or detach it first"
        )


def require_no_rows(record: Attachments) -> None:
    chosen = record.state.chosen()
    if chosen is not None and chosen.rows is not None:
        raise ValueError(
            "model: inside rows(...) its adapters cannot be attached, detached, folded, chosen or named again"
        )
