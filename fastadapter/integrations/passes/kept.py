"""What is kept between passes, and what it was made from: checked against what is there now, once per pass.

Keys and values of a prompt, banks of several adapters: made once and used until anything they were made from changes.
That is looked up where it hangs in the model, so a parameter that was exchanged (``load_state_dict(assign=True)``,
``functional_call``), a swapped module or another choice in PEFT is noticed as well as a value that was written.
"""

import functools
import operator
import threading
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

# Whose modules compute what their parameters, buffers and children say, and nothing else.
_KNOWN = {"torch", "transformers", "fastadapter", "bitsandbytes", "torchao"}
# What PEFT's layers compute depends on these too.
_PEFT_SETTINGS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
# Choices of adapters that have a stamp; serving switches between few mixes of rows.
_STAMPS = 64


# A module, or a module or parameter that may be exchanged: the module it is in, and its name there.
Part = nn.Module | tuple[nn.Module, str]


class Sources:
    """What some tensors were made from; ``None`` from :meth:`of` where a change could not be noticed.

    Attributes:
        tensors: whose values were used: the dictionary each is in, its key, itself, its version and address.
        objects: modules, and tensors that are read anew in every pass: the dictionary each is in, its key, itself.
        settings: of PEFT's layers: the module, attribute and value.
    """

    __slots__ = ("objects", "settings", "tensors")

    def __init__(self) -> None:
        self.tensors: list[tuple[dict, str, Tensor, int, int]] = []
        self.objects: list[tuple[dict, str, nn.Module | Tensor]] = []
        self.settings: list[tuple[nn.Module, str, Any]] = []

    @classmethod
    def of(cls, parts: "Iterable[Part]") -> "Sources | None":
        """Everything that ``parts`` and their children compute with."""
        sources = cls()
        for part in parts:
            module = part
            if isinstance(part, tuple):
                parent, name = part
                if name in parent._parameters:
                    if not sources._add_tensor(parent._parameters, name):
                        return None
                    continue
                module = parent.get_submodule(name)
                sources.objects.append((parent._modules, name, module))
            if not sources._add(cast(nn.Module, module)):
                return None
        return sources

    def read_anew(self, tensors: Iterable[Tensor]) -> None:
        """Of these, another value is no change: whoever uses them looks at it."""
        known = {id(each) for each in tensors}
        self.objects += [row[:3] for row in self.tensors if id(row[2]) in known]
        self.tensors = [row for row in self.tensors if id(row[2]) not in known]

    def _add(self, module: nn.Module) -> bool:
        settings = _settings(module)
        if settings is None:
            return False
        self.settings += settings
        for container in (module._parameters, module._buffers):
            if not all(self._add_tensor(container, key) for key in container):
                return False
        for key, child in module._modules.items():
            if child is not None:
                self.objects.append((module._modules, key, child))
                if not self._add(child):
                    return False
        return True

    def _add_tensor(self, container: dict, key: str) -> bool:
        tensor = container[key]
        if tensor is None:
            return True
        # versions are not counted, or values are elsewhere
        if tensor.is_inference() or tensor.is_meta or hasattr(tensor, "ds_id"):
            return False
        self.tensors.append((container, key, tensor, tensor._version, tensor.data_ptr()))
        return True

    def are_current(self) -> bool:
        for container, key, tensor, version, address in self.tensors:
            if container.get(key) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        for container, key, each in self.objects:
            if container.get(key) is not each:
                return False
        return all(_value(module, name) == value for module, name, value in self.settings)


def _settings(module: nn.Module) -> list[tuple[nn.Module, str, Any]] | None:
    """What a module computes with besides its tensors and children; ``None`` where that is not known."""
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return None
    if getattr(
        module, "_is_fsdp_managed_module", False
    ):  # its parameters are gathered without counting versions
        return None
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        function = hook.func if isinstance(hook, functools.partial) else hook
        if not str(getattr(function, "__module__", "")).startswith("fastadapter."):
            return None
    library = type(module).__module__.partition(".")[0]
    if library == "peft":
        return [(module, name, _value(module, name)) for name in _PEFT_SETTINGS if hasattr(module, name)]
    return [] if library in _KNOWN else None


def _value(module: nn.Module, name: str) -> Any:
    value = getattr(module, name, None)
    return (
        tuple(value.items())
        if isinstance(value, dict)
        else tuple(value)
        if isinstance(value, list)
        else value
    )


class Flat:
    """Many :class:`Sources` as columns, equal rows once: they are looked at before every pass, in C."""

    def __init__(self, sources: list[Sources]):
        tensors = {
            (id(row[0]), row[1], id(row[2]), *row[3:]): row for each in sources for row in each.tensors
        }
        objects = {(id(row[0]), row[1], id(row[2])): row for each in sources for row in each.objects}
        looked_at = {key[:3] for key in tensors}
        objects = {key: row for key, row in objects.items() if key not in looked_at}
        self._holders, self._names, self._tensors, self._versions, self._addresses = _columns(tensors, 5)
        self._parents, self._children, self._objects = _columns(objects, 3)
        self._settings = [setting for each in sources for setting in each.settings]

    def are_current(self) -> bool:
        """Whether all of them are."""
        return (
            all(map(operator.is_, map(dict.get, self._holders, self._names), self._tensors))
            and list(map(_version, self._tensors)) == self._versions
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and all(map(operator.is_, map(dict.get, self._parents, self._children), self._objects))
            and all(_value(module, name) == value for module, name, value in self._settings)
        )


_version = Tensor._version.__get__  # type: ignore[attr-defined]


def _columns(rows: dict[Any, tuple], count: int) -> list[list]:
    return [list(column) for column in zip(*rows.values(), strict=True)] or [[] for _ in range(count)]


class Kept:
    """Something that was made, and from what."""

    __slots__ = ("is_valid", "sources", "value")

    def __init__(self, value: Any, sources: Sources):
        self.value = value
        self.sources = sources
        self.is_valid = True


_is_valid = operator.attrgetter("is_valid")


class Store:
    """What is kept for one model. A pass that keeps calls :meth:`check` before its first layer."""

    def __init__(self) -> None:
        self._entries: list[Kept] = []
        self._flat: tuple[list[Kept], Flat] | None = None  # of these entries
        self._stamps: dict[Any, object] = {}
        self._lock = threading.Lock()

    def stamp(self, choice: Any) -> object:
        """One object for all passes of a choice, until something that was kept is out of date."""
        found = self._stamps.get(choice)
        if found is None:
            if len(self._stamps) >= _STAMPS:
                self._stamps = {}
            found = self._stamps.setdefault(choice, object())
        return found

    def check(self) -> None:
        """Mark what is out of date."""
        entries, flat = self._entries, self._flat
        if flat is None or flat[0] is not entries:
            flat = self._flat = entries, Flat([entry.sources for entry in entries])
        if flat[1].are_current() and all(map(_is_valid, entries)):
            return
        stale = False
        for entry in entries:
            if not (entry.is_valid and entry.sources.are_current()):
                entry.is_valid = False
                stale = True
        if stale:
            self._stamps = {}
            with self._lock:
                self._entries = [entry for entry in self._entries if entry.is_valid]

    def make(
        self,
        make: Callable[[], Any],
        parts: Iterable[Part],
        read_anew: Callable[[Any], Iterable[Tensor]] | None = None,
    ) -> Kept | None:
        """What ``make`` gives, to be kept; ``None`` where changes of what it is made from cannot be noticed.

        Made outside inference mode, the tensors stay usable wherever the model is called from next.

        Args:
            read_anew: the tensors of what was made whose values are looked at in every pass.
        """
        sources = Sources.of(parts)
        if sources is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            entry = Kept(make(), sources)
        if read_anew is not None:
            sources.read_anew(read_anew(entry.value))
        with self._lock:
            self._entries = [*self._entries, entry]
        return entry
