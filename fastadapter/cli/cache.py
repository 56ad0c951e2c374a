"""``fastadapter cache``: the states of frozen trunks that training has kept, and their removal."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from fastadapter.training import TrunkCache, UserError
from fastadapter.training.trunk.store import ABOUT_FILE, Entry, entries, remove, size_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trunk-cache-dir", type=Path, help="folder of the states; trunks in the cache folder if not given"
    )
    parser.add_argument(
        "--clear",
        nargs="?",
        const="",
        metavar="TRUNK",
        help="remove the states of all trunks, or of the one whose name begins so (runs that use them go on); "
        "if not given, they are listed",
    )
    parser.add_argument("--json", action="store_true", help="print what there is, or was removed, as JSON")


def run(args: argparse.Namespace) -> int:
    root = TrunkCache(args.trunk_cache_dir).root
    trunks: dict[str, list[Entry]] = {}
    for entry in entries(root):
        trunks.setdefault(entry.path.parent.name, []).append(entry)
    if args.clear is not None:
        trunks = {name: found for name, found in trunks.items() if name.startswith(args.clear)}
        if args.clear and not trunks:
            raise UserError(f"--clear {args.clear}: no trunk in {root} has a name that begins so")
    rows = [_row(root, name, found) for name, found in trunks.items()]
    if args.clear is not None:
        rows = [{**row, "bytes": sum(map(remove, trunks[row["trunk"]]))} for row in rows]
    if args.json:
        print(json.dumps({"folder": str(root), "trunks": rows}, indent=2))
        return 0
    for row in rows:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used"]))
        print(f"{row['trunk']}  {size_text(row['bytes']):>10}  used {day}  {row['what']}")
    what = "removed" if args.clear is not None else "in all"
    print(f"{size_text(sum(row['bytes'] for row in rows))} {what}, {root}")
    return 0


def _row(root: Path, name: str, found: list[Entry]) -> dict[str, Any]:
    try:
        about = json.loads((root / name / ABOUT_FILE).read_text(encoding="utf-8"))
        what = f"{about['class']}, {about['blocks']} blocks, {about['dtype']}"
    except (OSError, ValueError, KeyError, TypeError):
        what = "of an unknown model"
    return {
        "trunk": name,
        "what": what,
        "shards": len(found),
        "bytes": sum(entry.bytes for entry in found),
        "used": max(entry.used for entry in found),
    }
