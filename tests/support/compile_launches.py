"""Compiles noted calls of launchers for GPUs that are not there: ``python -m tests.support.compile_launches``.

Reads calls as :mod:`.launches` notes them, one a line, from its input; prints one line of JSON for each kernel that
does not compile and a last one with how many did. With ``--sample N SEED``, N kernels chosen by SEED, and as many times
``FRONT_END`` further ones as far as Triton's first intermediate code, where most of what can be refused is.
``--front-end`` takes all of them that far.
"""

import argparse
import contextlib
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Iterator

import torch
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import compiler, make_backend

from benchmarks.audit import capture

ARCHITECTURES = ("sm_80", "sm_90")
FRONT_END = 4
# Triton 3.6, the oldest that is promised, takes no product over fewer positions; newer ones take 8 in fp32.
LEAST_PRODUCT = 16


@contextlib.contextmanager
def oldest_rules() -> Iterator[None]:
    """Inside the block, products have to be as large as the oldest Triton wants them."""
    current = nvidia.min_dot_size

    def min_dot_size(target):
        check = current(target)

        def sizes(lhs, rhs):
            m, n, k = check(lhs, rhs)
            return m, n, max(k, LEAST_PRODUCT)

        return sizes

    nvidia.min_dot_size = min_dot_size
    try:
        yield
    finally:
        nvidia.min_dot_size = current


def front_end(launch: capture.Launch, arch: str) -> None:
    """As far as Triton's first intermediate code."""
    source, options, _ = capture.specialise(launch, arch)
    backend = make_backend(capture.TARGETS[arch])
    options = backend.parse_options(dict(options.__dict__))
    context = compiler.ir.context()
    compiler.ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source.make_ir(capture.TARGETS[arch], options, functions, modules, context)


def build(value, halves: str):
    """An argument without memory; fp16 as ``halves``, which the interpreter may not have."""
    if isinstance(value, dict):
        name = value.get("dtype", value.get("is"))
        dtype = getattr(torch, halves if name == "float16" else name)
        if "is" in value:
            return dtype
        tensor = torch.empty_strided(value["shape"], value["strides"], dtype=dtype, device="meta")
        if not value["aligned"]:
            return Misaligned(tensor)
        return tensor
    if isinstance(value, list):
        return tuple(build(item, halves) for item in value)
    return value


class Misaligned(torch.Tensor):
    """A view that does not begin at a multiple of 16 bytes: its loads are narrower."""

    @staticmethod
    def __new__(cls, tensor):
        return tensor.as_subclass(cls)

    def data_ptr(self) -> int:
        return 2


def variants(call: dict) -> list[tuple[str, str]]:
    """Architectures, each with fp16 and with bf16 where the call has halves."""
    text = json.dumps(call)
    halves = ("float16", "bfloat16") if '"float16"' in text else ("float16",)
    return [(arch, half) for arch in ARCHITECTURES for half in halves]


def launches(call: dict, arch: str, halves: str) -> list[capture.Launch]:
    """What the call launches there; none where that architecture takes another way."""
    function = getattr(importlib.import_module(call["module"]), call["function"])
    names = [name for name in inspect.signature(function).parameters if name in call["arguments"]]
    arguments = [build(value, halves) for value in [*map(call["arguments"].get, names), *call["rest"]]]
    with capture.recording() as found, capture.target.assume(arch):
        function(*arguments)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", nargs=2, metavar=("N", "SEED"))
    parser.add_argument("--front-end", action="store_true")
    args = parser.parse_args()
    work = [
        (json.loads(line), arch, halves) for line in sys.stdin for arch, halves in variants(json.loads(line))
    ]
    whole = 0 if args.front_end else sys.maxsize
    stop = sys.maxsize
    if args.sample:
        whole, seed = int(args.sample[0]), args.sample[1]
        stop = whole * (1 + FRONT_END)
        work.sort(key=lambda item: hashlib.sha256((seed + json.dumps(item)).encode()).hexdigest())
    done, failed = set(), 0
    with oldest_rules():
        for call, arch, halves in work:
            if len(done) >= stop:
                break
            try:
                found = launches(call, arch, halves)
            except Exception as error:
                failed += _report(call, arch, halves, None, error)
                continue
            for launch in found:
                try:
                    key = capture.identity(launch, arch)
                    if key in done:
                        continue
                    done.add(key)
                    (capture.compile_launch if len(done) <= whole else front_end)(launch, arch)
                except Exception as error:
                    failed += _report(call, arch, halves, launch.name, error)
    print(json.dumps({"compiled": len(done), "failed": failed}))
    return int(failed > 0)


def _report(call, arch, halves, kernel, error) -> int:
    causes = []
    while error is not None:
        causes.append(f"{type(error).__name__}: {error}"[:600])
        error = error.__cause__
    print(
        json.dumps({"call": call, "arch": arch, "halves": halves, "kernel": kernel, "error": causes}),
        flush=True,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
