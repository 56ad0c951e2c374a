"""Keep a comparison in the repository: its finished runs, table and plots, without the paths of the machine.

    python scripts/store_comparison.py outputs/minilm benchmarks/results/compare_minilm

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
    parser.add_argument("target", type=Path, help="gets the runs; those that are there stay")
    args = parser.parse_args()
    settings = json.loads((args.folder / SETTINGS).read_text(encoding="utf-8"))
    args.target.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.folder / SETTINGS, args.target / SETTINGS)
    for file in sorted(args.folder.glob(f"runs/*/*/{RESULT}")):
        run = args.target / file.parent.relative_to(args.folder)
        run.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, run / RESULT)
        job = json.loads((file.parent / "job.json").read_text(encoding="utf-8"))
        write_json(run / "job.json", {**job, "model": "", "train": "", "test": ""})
    results = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(args.target.glob(f"runs/*/*/{RESULT}"))
    ]
    write_page(args.target, settings["settings"], results)


if __name__ == "__main__":
    main()
