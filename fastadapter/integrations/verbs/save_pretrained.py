"""The hook into ``save_pretrained`` of transformers and PEFT: what is saved of an adapted model holds its adapters.

From the first attach to the last detach the method of ``PreTrainedModel`` is wrapped, and that of ``PeftModel`` where
PEFT is imported at an attach. An attribute of one model would not survive copies, or would save the original in place
of the copy. transformers' Trainer writes its checkpoints with the same methods.
"""

import functools
import inspect
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

# Writes the adapters of a model; ``fastadapter.checkpoints``, which stands above this module, puts its own here.
# Called with the model, the folder, whether this process writes, and the weights if the caller gathered them.
writer: Callable[[Any, str | os.PathLike, bool, dict[str, Any] | None], None] | None = None

_held: "weakref.WeakSet[Hold]" = weakref.WeakSet()
_wrapped: dict[type, Any] = {}


class Hold:
    """Keeps the hook installed for as long as it exists; part of a model's record, so that copies have their own."""

    def __init__(self) -> None:
        self.__setstate__({"held": True})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _held.add(self)
        _install()

    def release(self) -> None:
        """Take the hook out if nobody else holds it."""
        _held.discard(self)
        if _held:
            return
        for owner, wrapped in list(_wrapped.items()):
            # Somebody who patched after us keeps our wrapper inside theirs; without adapters it only passes calls on.
            if owner.__dict__.get("save_pretrained") is wrapped:
                owner.save_pretrained = wrapped.__wrapped__  # type: ignore[attr-defined]
                del _wrapped[owner]


def _install() -> None:
    import transformers

    peft = sys.modules.get("peft")
    for owner in (transformers.PreTrainedModel, getattr(peft, "PeftModel", None)):
        if owner is not None and owner not in _wrapped:
            owner.save_pretrained = _wrapped[owner] = _with_adapters(owner.save_pretrained)


def _with_adapters(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        # First the adapters: the original may send the folder to a hub. It refuses a file in place of a folder.
        if writer is not None and not os.path.isfile(save_directory):
            given = signature.bind(self, save_directory, *args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            writer(self, save_directory, given.get("is_main_process", True), given.get("state_dict"))
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained
