"""The hook into transformers' ``save_pretrained``: what is saved of an adapted model holds its adapters.

From the first attach to the last detach the method of ``PreTrainedModel`` is wrapped. An attribute of one model would
not survive copies, or would save the original in place of the copy. transformers' Trainer writes its checkpoints with
the same method.
"""

import functools
import inspect
import os
import weakref
from collections.abc import Callable
from typing import Any

# Writes the adapters of a model; ``fastadapter.checkpoints``, which stands above this module, puts its own here.
# Called with the model, the folder, whether this process writes, and the weights if the caller gathered them.
writer: Callable[[Any, str | os.PathLike, bool, dict[str, Any] | None], None] | None = None

_held: "weakref.WeakSet[Hold]" = weakref.WeakSet()
_original: Any = None
_wrapped: Any = None


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
        from transformers import PreTrainedModel

        _held.discard(self)
        # Somebody who patched after us keeps our wrapper inside theirs; without adapters it only passes calls on.
        if not _held and PreTrainedModel.save_pretrained is _wrapped:
            PreTrainedModel.save_pretrained = _original


def _install() -> None:
    from transformers import PreTrainedModel

    global _original, _wrapped
    if PreTrainedModel.save_pretrained is _wrapped:
        return
    original = _original = PreTrainedModel.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        # First the adapters: the original may send the folder to a hub. It refuses a file in place of a folder.
        if writer is not None and not os.path.isfile(save_directory):
            given = signature.bind(self, save_directory, *args, **kwargs).arguments
            writer(self, save_directory, given.get("is_main_process", True), given.get("state_dict"))
        return original(self, save_directory, *args, **kwargs)

    PreTrainedModel.save_pretrained = _wrapped = save_pretrained
