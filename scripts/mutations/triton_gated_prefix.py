"""Mistakes in the Triton kernels of gated_prefix."""

from .record import of_file

TESTS = "tests/test_gated_prefix_triton.py -k within_budget"

GATED_PREFIX = [
    *of_file(
        "kernels/gated_prefix_tiles.py",
        TESTS,
        no_max_subtraction=(
            "m_new = tl.maximum(m_i, tl.max(s, axis=1))",
            "m_new = tl.maximum(m_i, 0.0)",
            "tests/test_gated_prefix.py -k 'large_logits and triton'",
        ),
        padded_positions_in_the_normaliser=('return tl.where(mask_p[None, :], s, float("-inf"))', "return s"),
        missing_scale=('input_precision="ieee") * scale_log2', 'input_precision="ieee")'),
        minus_one_is_entry_zero=(
            "gate = tl.where(row_id == -1, 0.0, gate)",
            "gate = gate * 1.0",
            "tests/test_gated_prefix_triton.py -k without_an_adapter",
        ),
        ids_beyond_the_bank_read_entry_zero=(
            '    gate = tl.where((row_id < -1) | (row_id >= num_prefixes), float("nan"), gate)\n',
            "",
            "tests/test_gated_prefix_triton.py -k outside_the_bank",
        ),
        tanh_slope_missing=("slope = 1.0 - factor * factor", "slope = 1.0 + factor * 0.0"),
        int32_offsets=(
            "(ptr + row * STRIDES[0] + head",
            "(ptr + (row * STRIDES[0]).to(tl.int32) + head",
            "tests/test_gated_prefix_triton.py -k 32_bits",
        ),
    ),
    *of_file(
        "kernels/gated_prefix.py",
        TESTS,
        normaliser_not_rescaled=(
            "l_i = l_i * alpha + tl.sum(p, axis=1)\n                acc",
            "l_i = l_i + tl.sum(p, axis=1)\n                acc",
        ),
        zero_gate_adds_zero=(
            "        out = tl.where(factor != 0.0, out, base)\n",
            "",
            "tests/test_gated_prefix_triton.py -k zero_gate",
        ),
        kv_head_by_remainder=(
            "head = kv_head * group_size + visit // num_tiles",
            "head = kv_head + (visit // num_tiles) * num_kv_heads",
            "tests/test_gated_prefix.py -k 'within_budget and triton'",
        ),
        last_visit_lost=(
            "last_visit = tl.minimum(first_visit + visits_per_run, group_size * num_tiles)",
            "last_visit = tl.minimum(first_visit + visits_per_run, group_size * num_tiles - 1)",
        ),
    ),
    *of_file(
        "kernels/gated_prefix_backward.py",
        TESTS,
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
            "tests/test_gated_prefix_triton.py -k has_alone",
        ),
        reduce_adds_every_row=(
            "mask=mask_r, other=-1) == entry)",
            "mask=mask_r, other=-1) >= 0)",
            "tests/test_gated_prefix_triton.py -k isolated",
        ),
        value_gradient_of_the_next_entry=(
            "grad_value_ptr + (entry - 1) * kv_columns",
            "grad_value_ptr + (tl.maximum(entry, 1) - 1) * kv_columns",
            "tests/test_gated_prefix_triton.py -k within_budget",
        ),
    ),
]
