"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, matrix instructions.

Compiles every kernel ahead of time for each (architecture, dtype, head_dim, prefix_len) with the tiles that
``config`` picks, and prints one JSON row per compile. Run it outside the interpreter:

    python benchmarks/audit.py --arch 90 gfx942 --dtype bf16 --head-dim 128 --prefix-len 10
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Triton 3.9 warns unless it is told; fused multiply-add is what the error budget was met with.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "fp16": ("fp16", "fp16"),
    "bf16": ("bf16", "bf16"),
    "fp32": ("fp32", "fp32"),
    "bf16-fp32": ("bf16", "fp32"),
}
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# backward does everything in one program when the prefix is one block; longer ones are split in two launches
KERNELS = ("forward", "backward", "backward-query", "backward-prefix", "reduce")
SOURCE = Path(__file__).parents[1] / "kernels" / "gated_prefix.py"


def load_kernels():
    """The kernel file itself, so that the audit needs neither an installed package nor an extension."""
    spec = importlib.util.spec_from_file_location("gated_prefix_kernels", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(module._gated_prefix_fwd_kernel, triton.JITFunction):
        raise SystemExit("audit.py compiles kernels: unset TRITON_INTERPRET")
    return module


def describe(kernels, kernel: str, arch: str, dtype: str, head_dim: int, prefix_len: int) -> dict:
    """Compile one kernel; its row of the table."""
    activation, prefix = DTYPES[dtype]
    block_m, block_p, num_warps, num_stages = kernels.config(
        head_dim, prefix_len, TORCH_DTYPES[activation], TORCH_DTYPES[prefix], kernel == "backward-prefix"
    )
    tensors = {
        "base": activation, "query": activation, "out": activation, "grad_out": activation,
        "grad_query": activation, "key": prefix, "value": prefix, "grad_key": prefix, "grad_value": prefix,
        "gate": "fp32", "grad_gate": "fp32", "partial": "fp32", "stats": "fp32", "row_ids": "i32",
    }  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_P": block_p, "BLOCK_D": kernels.block_d(head_dim),
        "HAS_ROW_IDS": True, "TANH": True, "ONE_BLOCK": prefix_len <= block_p,
        "WIDE": "ieee" if arch.startswith("gfx") else "tf32",
        "NEED_QUERY": kernel != "backward-prefix", "NEED_PREFIX": kernel != "backward-query",
        "NEED_GATE": kernel != "backward-prefix", "SAVE_STATS": kernel == "backward-query",
        "BLOCK_R": kernels.REDUCE_ROWS, "BLOCK_E": kernels.REDUCE_COLUMNS,
    }  # fmt: skip
    fn = {
        "forward": kernels._gated_prefix_fwd_kernel,
        "backward": kernels._gated_prefix_bwd_kernel,
        "reduce": kernels._gated_prefix_reduce_kernel,
    }[kernel.partition("-")[0]]
    signature, constexprs, attrs = {}, {}, {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(fn.arg_names):
        if name.endswith("_ptr"):
            signature[name] = "*" + tensors[name.removesuffix("_ptr")]
            attrs[(i,)] = aligned
        elif name.endswith("_STRIDES"):
            # what a contiguous tensor is specialised to: unit innermost stride, the others divisible by 16
            rank = 2 if name == "GATE_STRIDES" else 4
            signature[name] = (*("i32",) * (rank - 1), "constexpr")
            constexprs[(i, rank - 1)] = 1
            attrs |= {(i, axis): aligned for axis in range(rank - 1)}
        elif name in constants:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants[name]
        else:
            signature[name] = "fp32" if name == "softmax_scale" else "i32"
    options = {"num_warps": 4 if kernel == "reduce" else num_warps, "num_stages": num_stages}
    compiled = triton.compile(ASTSource(fn, signature, constexprs, attrs), TARGETS[arch], options)
    row = {
        "kernel": kernel, "arch": arch, "dtype": dtype, "head_dim": head_dim, "prefix_len": prefix_len,
        "block_m": block_m, "block_p": block_p, "num_warps": options["num_warps"], "shared": compiled.metadata.shared,
    }  # fmt: skip
    return row | (amd_resources if arch.startswith("gfx") else nvidia_resources)(compiled)


def nvidia_resources(compiled) -> dict:
    """Read from the machine code, by the tools in the triton wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    return {
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "matrix_instructions": bool(re.search(r"\b(?:HMMA|UTCHMMA|HGMMA)\b", sass)),
        "wgmma": "HGMMA" in sass,
        "widest_load": max(
            (int(bits) for bits in re.findall(r"\b(?:LDG|LDGSTS)\S*\.(\d+)\b", sass)), default=32
        ),
    }


def amd_resources(compiled) -> dict:
    """Read from the metadata that LLVM writes into the assembly."""
    text = compiled.asm["amdgcn"]
    field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    widths = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads = re.findall(r"\b(?:global|buffer)_load_(dword(?:x\d)?)\b", text)
    return {
        "registers": field["vgpr_count"],
        "stack": field["private_segment_fixed_size"],
        # scalar registers spill into lanes of vector registers, not into memory
        "spills": field["vgpr_spill_count"],
        "matrix_instructions": "v_mfma" in text,
        "wgmma": False,
        "widest_load": max((widths[load] for load in loads), default=32),
    }


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--prefix-len", nargs="+", type=int, default=[10])
    args = parser.parse_args()
    kernels = load_kernels()
    rows = [
        describe(kernels, kernel, arch, dtype, head_dim, prefix_len)
        for kernel in args.kernel
        for arch in args.arch
        for dtype in args.dtype
        for head_dim in args.head_dim
        for prefix_len in args.prefix_len
    ]
    json.dump(rows, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
