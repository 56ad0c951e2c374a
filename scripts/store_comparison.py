"""Keep a comparison in the repository: its finished runs, table and plots, without the paths of the machine.

    python scripts/store_comparison.py outputs/minilm benchmarks/results/compare_minilm
    python scripts/store_comparison.py --redraw benchmarks/results/compare_minilm

In a copy of the stored folder, the command that made it goes on where it stopped.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastadapter.compare.report import write_page  # noqa: E402
from fastadapter.compare.run import SETTINGS  # noqa: E402
from fastadapter.compare.worker import RESULT  # noqa: E402
from fastadapter.training import write_json  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of fastadapter compare")
    parser.add_argument("target", type=Path, nargs="?", help="gets the runs; those that are there stay")
    parser.add_argument("--redraw", action="store_true", help="only table and plots of a stored FOLDER, anew")
    args = parser.parse_args()
    if args.redraw == (args.target is not None):
        parser.error("name a target, or --redraw and the stored folder alone")
    if not args.redraw:
        _store(args.folder, args.target)
    target = args.folder if args.redraw else args.target
    settings = json.loads((target / SETTINGS).read_text(encoding="utf-8"))
    results = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(target.glob(f"runs/*/*/{RESULT}"))
    ]
    write_page(target, settings["settings"], results)


def _store(folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / SETTINGS, target / SETTINGS)
    for file in sorted(folder.glob(f"runs/*/*/{RESULT}")):
        run = target / file.parent.relative_to(folder)
        run.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, run / RESULT)
        job = json.loads((file.parent / "job.json").read_text(encoding="utf-8"))
        write_json(run / "job.json", {**job, "model": "", "train": "", "test": ""})


if __name__ == "__main__":
    main()
