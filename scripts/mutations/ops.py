"""Mistakes in the typed functions and their autograd."""

from .record import of_file

GATED_PREFIX = "tests/test_gated_prefix.py -k 'not triton and (bad_calls or bad_options or frozen or budget)'"
CANCELLING = "tests/test_cancelling_gradients.py -k 'prefix_attention and cpp'"
SCALARS = "tests/test_argument_checks.py"
FROZEN = "tests/test_attention_ops.py -k 'frozen and not triton'"
BOTTLENECK = "tests/test_bottleneck.py -k 'not triton and (frozen or budget or leading or bad)'"
KEPT_Z = "tests/test_bottleneck_cpp.py -k kept_z"
CALLS = "tests/test_attention_ops_calls.py -k bad"

OPS = [
    *of_file(
        "fastadapter/ops/checks.py",
        GATED_PREFIX,
        ids_below_minus_one=("low < -1 or high", "low < -2 or high"),
        ids_beyond_the_bank=("high >= num_prefixes", "high > num_prefixes"),
    ),
    *of_file(
        "fastadapter/ops/checks.py",
        SCALARS,
        scale_of_nan_accepted=("if not abs(value) <= _LARGEST:", "if abs(value) > _LARGEST:"),
        layout_seen_once_lets_others_through=("x.device, x.layout)", "x.device)"),
    ),
    *of_file(
        "fastadapter/ops/prefix_attention.py",
        CANCELLING,
        delta_from_a_rounded_output=("wide_out if checks.is_half(out) else out", "out.to(lse.dtype)"),
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
        BOTTLENECK,
        residual_gets_no_gradient=(
            "grad_out if need_residual else None, *grads",
            "None, *grads",
            "tests/search/test_search.py -k 'cpu and bottleneck'",
        ),
        frozen_up_freezes_down=(
            "parameters[0] or parameters[1], parameters",
            "parameters[0] and parameters[1], parameters",
        ),
        frozen_bias_freezes_the_other=(
            "parameters[2] or parameters[3]\n",
            "parameters[2] and parameters[3]\n",
        ),
        frozen_norm_bias_freezes_its_weight=(
            "need_norm_weight or need_norm_bias",
            "need_norm_weight and need_norm_bias",
        ),
        tied_residual_counts_twice=(
            "        if residual_is_x:  # one input",
            "        if False:  # one input",
        ),
        tied_residual_gets_no_gradient=("(*constants, residual_is_x)", "(*constants, False)"),
        rows_of_two_dims_share_an_id=("dim = 1 if by_row else 0", "dim = 0"),
        ids_beyond_the_bank=("row_ids, x.shape[0], num_entries)", "row_ids, x.shape[0], num_entries + 1)"),
        dtype_of_the_up_weight_unchecked=(
            'for name in ("up_weight", "down_bias", "up_bias"):',
            'for name in ("down_bias", "up_bias"):',
        ),
        z_is_never_kept=(
            'keeps = chosen == "cpp" or',
            'keeps = chosen == "none" or',
            KEPT_Z,
        ),
        z_is_kept_for_a_constant_slope=('return activation != "identity" and any(', "return any(", KEPT_Z),
        z_is_dropped_where_weights_train=(
            "if down_weight.requires_grad or up_weight.requires_grad:",
            "if down_weight.requires_grad and up_weight.requires_grad:",
            KEPT_Z,
        ),
    ),
]
