"""Mistakes in the Triton kernels of gated_prefix."""

from .record import of_file

TESTS = "tests/test_gated_prefix_triton.py -k within_budget"


def tests_named(word):
    return f"tests/test_gated_prefix_triton.py -k {word}"


GATED_PREFIX = of_file(
    "kernels/gated_prefix.py",
    TESTS,
    no_max_subtraction=(
        "m_new = tl.maximum(m_i, tl.max(s, axis=1))",
        "m_new = tl.maximum(m_i, 0.0)",
        "tests/test_gated_prefix.py -k 'large_logits and triton'",
    ),
    padded_positions_in_the_normaliser=('return tl.where(mask_p[None, :], s, float("-inf"))', "return s"),
    missing_scale=('input_precision="ieee") * scale_log2', 'input_precision="ieee")'),
    normaliser_not_rescaled=(
        "l_i = l_i * alpha + tl.sum(p, axis=1)\n            # p is",
        "l_i = l_i + tl.sum(p, axis=1)\n            # p is",
    ),
    zero_gate_adds_zero=(
        "    if factor != 0.0:\n        q_ptrs",
        "    if factor == factor:\n        q_ptrs",
        tests_named("zero_gate"),
    ),
    minus_one_is_entry_zero=(
        "gate = tl.where(row_id == -1, 0.0, gate)",
        "gate = gate * 1.0",
        tests_named("without_an_adapter"),
    ),
    ids_beyond_the_bank_read_entry_zero=(
        '    gate = tl.where((row_id < -1) | (row_id >= num_prefixes), float("nan"), gate)\n',
        "",
        tests_named("outside_the_bank"),
    ),
    kv_head_by_remainder=(
        "kv_head = head // (num_heads // num_kv_heads)\n\n    offs_m = pid_m",
        "kv_head = head % num_kv_heads\n\n    offs_m = pid_m",
        "tests/test_gated_prefix.py -k 'within_budget and triton'",
    ),
    tanh_slope_missing=("slope = 1.0 - factor * factor", "slope = 1.0 + factor * 0.0"),
    delta_missing=("weights * (dp - delta[:, None])", "weights * dp"),
    stale_statistics=(
        "tl.store(stats_ptrs + 2 * stats_plane, delta, mask=mask_m)",
        "tl.store(stats_ptrs + 2 * stats_plane, delta / l_i, mask=mask_m)",
    ),
    key_gradient_of_one_head=(
        "dk = _dot_fp32_by(tl.trans(ds), q, dk, WIDE)",
        "dk = _dot_fp32_by(tl.trans(ds), q, dk * 0.0, WIDE)",
    ),
    key_gradient_without_scale=("dk * softmax_scale, mask=mask_pd", "dk, mask=mask_pd"),
    query_gradient_without_scale=("(dq * softmax_scale)", "(dq)"),
    value_gradient_without_gate=(
        "dv = _dot_fp32_by(tl.trans(weights), do, dv, WIDE)",
        "dv = _dot_fp32_by(tl.trans(weights / factor), do, dv, WIDE)",
    ),
    last_tile_lost=(
        "last_tile = tl.minimum(first_tile + tiles_per_slot, num_tiles)",
        "last_tile = tl.minimum(first_tile + tiles_per_slot, tl.maximum(num_tiles - 1, 1))",
    ),
    reduce_takes_one_slot=(
        "for slot in range(slots_per_row):",
        "for slot in range(tl.minimum(slots_per_row, 1)):",
        tests_named("has_alone"),
    ),
    reduce_adds_every_row=(
        "mask=mask_r, other=-1) == entry)",
        "mask=mask_r, other=-1) >= 0)",
        tests_named("isolated"),
    ),
    value_gradient_of_the_next_entry=(
        "grad_value_ptr + (entry - 1) * kv_columns",
        "grad_value_ptr + (tl.maximum(entry, 1) - 1) * kv_columns",
        tests_named("within_budget"),
    ),
    int32_offsets=(
        "(ptr + row * STRIDES[0] + head",
        "(ptr + (row * STRIDES[0]).to(tl.int32) + head",
        tests_named("32_bits"),
    ),
)
