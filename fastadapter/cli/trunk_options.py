"""Options of the trunk cache, shared by what trains."""

import argparse
from pathlib import Path

from fastadapter.training import TrunkCache, UserError
from fastadapter.training.trunk.options import DTYPES, MAX_BYTES


def add_trunk_arguments(parser: argparse.ArgumentParser, one_run: bool = True) -> None:
    """The group trunk cache.

    Args:
        one_run: one method is trained, so that a run may be asked to have it or to fail.
    """
    group = parser.add_argument_group(
        "trunk cache",
        "states behind the blocks below all that is trained, computed once for all epochs and for later runs with the "
        "same records",
    )
    if one_run:
        group.add_argument(
            "--trunk-cache",
            action=argparse.BooleanOptionalAction,
            help="use it, or fail and say why; or never; where it pays by far if not given",
        )
        group.add_argument(
            "--trunk-cache-dtype",
            choices=tuple(DTYPES),
            default="base",
            help="of the states: the model's own, or bf16: half the space, rounded; goes with --trunk-cache",
        )
    else:
        group.add_argument(
            "--no-trunk-cache",
            dest="trunk_cache",
            action="store_false",
            default=None,
            help="never; where it pays by far if not given",
        )
    group.add_argument(
        "--trunk-cache-dir", type=Path, help="folder of the states; trunks in the cache folder if not given"
    )
    group.add_argument(
        "--trunk-cache-gib",
        type=float,
        default=MAX_BYTES / 2**30,
        help="most that all states there may take; those that were not used for longest go first",
    )


def trunk_cache(args: argparse.Namespace, runs: int = 1) -> TrunkCache | bool:
    """What the options ask for. Raises: UserError: naming the option."""
    dtype = getattr(args, "trunk_cache_dtype", "base")
    if dtype != "base" and not args.trunk_cache:
        raise UserError(f"--trunk-cache-dtype {dtype} changes the numbers, so it needs --trunk-cache")
    if args.trunk_cache is False and args.trunk_cache_dir is not None:
        raise UserError("--trunk-cache-dir goes without --no-trunk-cache")
    if not 0 < args.trunk_cache_gib < 2**33:
        raise UserError(f"--trunk-cache-gib must be above 0, got {args.trunk_cache_gib:g}")
    if args.trunk_cache is False:
        return False
    size = max(1, int(args.trunk_cache_gib * 2**30))
    return TrunkCache(args.trunk_cache_dir, dtype, size, required=bool(args.trunk_cache), runs=runs)
