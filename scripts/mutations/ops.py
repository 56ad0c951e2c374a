"""Mistakes in the typed functions and their autograd."""

from .record import of_file

GATED_PREFIX = "tests/test_gated_prefix.py -k 'not triton and (bad_calls or bad_options or frozen or budget)'"
FROZEN = "tests/test_attention_ops.py -k 'frozen and not triton'"
CALLS = "tests/test_attention_ops_calls.py -k bad"

OPS = [
    *of_file(
        "fastadapter/ops/checks.py",
        GATED_PREFIX,
        ids_below_minus_one=("low < -1 or high", "low < -2 or high"),
        ids_beyond_the_bank=("high >= num_prefixes", "high > num_prefixes"),
    ),
    *of_file(
        "fastadapter/ops/gated_prefix.py",
        GATED_PREFIX,
        base_gets_no_gradient=("grad_out if need_base else None, *grads", "None, *grads"),
        frozen_value_freezes_the_key=(
            "need_key or need_value, need_gate",
            "need_key and need_value, need_gate",
        ),
    ),
    *of_file(
        "fastadapter/ops/gated_prefix_attention.py",
        FROZEN,
        frozen_value_freezes_the_key=(
            "need_key or need_value, need_prefix_key",
            "need_key and need_value, need_prefix_key",
        ),
    ),
    *of_file(
        "fastadapter/ops/attention.py",
        CALLS,
        window_of_zero_accepted=("if window < 1:", "if window < 0:"),
        mask_beside_causality_ignored=(
            "        if is_causal:\n",
            "        if is_causal and attn_mask is None:\n",
        ),
        packed_lengths_unchecked=("ends[-1] != q_len or ", ""),
    ),
    *of_file(
        "fastadapter/ops/bottleneck.py",
        "tests/search/test_search.py -k 'cpu and bottleneck'",
        residual_gets_no_gradient=("grad_out if need_residual else None, *grads", "None, *grads"),
    ),
]
