"""What a caller says of the trunk cache."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastadapter.ops.self_check import cache_dir
from fastadapter.training.config import UserError

DTYPES = {"base": None, "bf16": torch.bfloat16}
MAX_BYTES = 10 << 30


@dataclass(frozen=True)
class TrunkCache:
    """Where the states of frozen trunks are kept, how, and how much of them.

    Args:
        folder: of all trunks; ``None``: ``trunks`` in the cache folder (``$FASTADAPTER_CACHE``).
        dtype: ``"base"``, that of the hidden states: a run computes what it would without a cache; or ``"bf16"``: half
            the bytes of fp32 states, and their numbers are rounded.
        max_bytes: most that all trunks in ``folder`` may take; those that were not used for longest go first.
        required: a run that cannot have it is an error; otherwise it is used where it pays by far.
        runs: how many runs are to come that can use the same states, which decides whether it pays.
    Raises: TypeError, UserError: naming the field, what was expected and what came.
    """

    folder: str | Path | None = None
    dtype: str = "base"
    max_bytes: int = MAX_BYTES
    required: bool = True
    runs: int = 1

    def __post_init__(self):
        if self.folder is not None and not isinstance(self.folder, str | Path):
            raise TypeError(f"trunk_cache folder must be a path, got {self.folder!r}")
        if self.dtype not in DTYPES:
            raise UserError(f"trunk_cache dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("max_bytes", "runs"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"trunk_cache {name} must be an int, at least 1, got {value!r}")
        if not isinstance(self.required, bool):
            raise TypeError(f"trunk_cache required must be True or False, got {self.required!r}")
        if self.dtype != "base" and not self.required:
            raise UserError(f"trunk_cache dtype {self.dtype!r} changes the numbers, so it must be required")

    @property
    def root(self) -> Path:
        return cache_dir() / "trunks" if self.folder is None else Path(self.folder)


Asked = bool | str | Path | TrunkCache | None


def resolve(trunk_cache: Asked) -> tuple[TrunkCache, bool | None]:
    """The options, and whether the cache is asked for (``None``: only if it pays).

    Raises: TypeError: it is nothing of what it can be.
    """
    if trunk_cache is None or isinstance(trunk_cache, bool):
        return TrunkCache(), trunk_cache
    if isinstance(trunk_cache, TrunkCache):
        return trunk_cache, True if trunk_cache.required else None
    if isinstance(trunk_cache, str | Path):
        return TrunkCache(trunk_cache), True
    raise TypeError(f"trunk_cache must be True, False, None, a folder or a TrunkCache, got {trunk_cache!r}")
