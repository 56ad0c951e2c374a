"""``fastadapter explain``: what an adapter adds to a model, how it runs, and whether it does what it should."""

import argparse
import json

from fastadapter.checkpoints import load
from fastadapter.cli.loading import (
    add_any_base,
    add_model_arguments,
    device_and_dtype,
)
from fastadapter.cli.runs import complete, load_base, read_known
from fastadapter.explain import explain
from fastadapter.integrations.verbs.attach import attach
from fastadapter.methods import LlamaAdapterConfig
from fastadapter.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, known=True)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--adapter", metavar="PATH", help="file or folder of an adapter; a fresh LLaMA-Adapter if not given"
    )
    add_any_base(adapter)
    output = parser.add_argument_group("output")
    output.add_argument("--verify", action="store_true", help="also run the self-check on the model")
    output.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    known = read_known(args.adapter) if args.adapter is not None else None
    complete(args, [known] if known is not None else [])
    device = device_and_dtype(args)
    model, _ = load_base(args, known)
    model.to(device)
    if known is not None:
        load(model, known.path, strict_base=not args.any_base)
    else:
        attach(model, LlamaAdapterConfig())
    explanation = explain(model)
    checks = verify(model) if args.verify else []
    if args.json:
        rows = [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in checks]
        print(
            json.dumps({"modules": explanation.rows, "frozen": explanation.frozen, "checks": rows}, indent=2)
        )
        return 0
    print(explanation)
    for check in checks:
        print(check)
    return 0
