"""``fastadapter bench``: the benchmarks that are installed with the package.

fastadapter bench plan --model llama-7b --gpu h100 --data alpaca-like   # time and memory of a run, before it
fastadapter bench audit --arch sm_90 --dtype bf16     # what the GPU kernels compile to; needs no GPU
fastadapter bench run --only gated_prefix             # CPU timings against peers
fastadapter bench gpu                                 # GPU correctness and timings
fastadapter bench versions HEAD~1 --only decode       # this version beside another, a round of each in turn
fastadapter bench table README.md --check             # tables drawn from stored rows
fastadapter bench report                              # every table and picture of the documents
"""

import argparse
import importlib

# Modules by their names in fastadapter.benchmarks. What each needs beyond torch is asked for when it is chosen.
WHAT = {
    "plan": (".cli.plan", "predict time and memory of a training run, and hold measured rows against it"),
    "audit": ("audit.command", "compile the Triton kernels without a GPU and show registers, spills, floors"),
    "run": ("run", "time ops and recipes on this machine's CPU, against peers"),
    "gpu": ("gpu", "GPU correctness against fp64, then timings against peers"),
    "versions": ("versions", "time this version beside another commit, interleaved"),
    "table": ("table", "draw Markdown tables from stored rows"),
    "plot": ("plot", "draw stored ratios as bars"),
    "report": ("report", "draw every table and picture of the documents from stored rows"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listing = "; ".join(f"{name}: {description}" for name, (_, description) in WHAT.items())
    parser.add_argument("what", choices=WHAT, help=listing)
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        default=[],
        help="its own options; `fastadapter bench WHAT --help` shows them",
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark with its own options; its exit status."""
    module, _ = WHAT[args.what]
    return importlib.import_module(f".{module}", "fastadapter.benchmarks").main(args.options) or 0
