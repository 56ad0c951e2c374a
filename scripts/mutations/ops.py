"""Mistakes in the typed functions and their autograd."""

from .record import of_file

CPU = "-k 'not triton'"
ATTENTION = "tests/test_attention_ops.py tests/test_attention_ops_calls.py"

OPS = [
    *of_file(
        "fastadapter/ops/checks.py",
        f"tests/test_gated_prefix.py {CPU}",
        ids_below_minus_one=("low < -1 or high", "low < -2 or high"),
    ),
]
