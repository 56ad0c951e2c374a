"""Mistakes in the Triton kernels of gated_prefix and prefix_merge."""

from .record import of_file

TESTS = "tests/test_gated_prefix_triton.py -k within_budget"
MERGES = "tests/test_prefix_merge_triton.py -k extends_the_softmax"
GRADIENTS_OF_A_MERGE = "tests/test_prefix_merge_triton.py -k backward_of_a_prefix"


def tests_named(words):
    return f"tests/test_gated_prefix_triton.py -k '{words}'"


PREFIX_TERM = [
    *of_file(
        "kernels/prefix_tiles.py",
        TESTS,
        missing_scale=("input_precision=PRECISION) * softmax_scale", "input_precision=PRECISION)"),
        padded_positions_in_the_normaliser=(
            'return tl.where(mask_p[None, :], s, float("-inf")), slope',
            "return s, slope",
        ),
        no_max_subtraction=(
            "m_new = tl.maximum(m_i, tl.max(s, axis=1))",
            "m_new = tl.maximum(m_i, 0.0)",
            "tests/test_gated_prefix.py -k 'large_logits and triton'",
        ),
        softcap_dropped=("s = t * softcap", "s = s * 1.0", MERGES),
        softcap_slope_dropped=("slope = 1.0 - t * t", "slope = 1.0 + t * 0.0", GRADIENTS_OF_A_MERGE),
        tanh_by_the_exponential_alone=(
            "return tl.where(tl.abs(x) < 0.625, x + x * z * series, tail)",
            "return tl.where(tl.abs(x) < 0.0, x + x * z * series, tail)",
            tests_named("gate_factor"),
        ),
        gate_of_the_first_head=(
            "entry * GATE_STRIDES[0] + head * GATE_STRIDES[1])",
            "entry * GATE_STRIDES[0] + head * 0)",
        ),
        every_row_has_the_first_id=(
            "tl.load(row_ids_ptr + row).to(tl.int64)",
            "tl.load(row_ids_ptr + row * 0).to(tl.int64)",
        ),
        minus_one_is_entry_zero=(
            "factor = tl.where(row_id == -1, 0.0, factor)",
            "factor = factor * 1.0",
            tests_named("without_an_adapter"),
        ),
        ids_beyond_the_bank_read_entry_zero=(
            'return tl.where((row_id < -1) | (row_id >= num_prefixes), float("nan"), factor)',
            "return factor",
            tests_named("outside_the_bank"),
        ),
        int32_offsets=(
            "offs_row = row * STRIDES[0] + head",
            "offs_row = (row * STRIDES[0]).to(tl.int32) + head",
            tests_named("32_bits"),
        ),
    ),
    *of_file(
        "kernels/prefix_term.py",
        TESTS,
        normaliser_missing=("acc * (factor / l_i)[:, None]", "acc * (factor + 0.0 * l_i)[:, None]"),
        normaliser_not_rescaled=(
            "l_i = l_i * alpha + tl.sum(p, axis=1)",
            "l_i = l_i + tl.sum(p, axis=1)",
        ),
        accumulator_not_rescaled=("vn, acc * alpha[:, None],", "vn, acc,"),
        last_tile_of_a_run_lost=(
            "last_tile = tl.minimum(first_tile + tiles_per_run, tiles)",
            "last_tile = tl.minimum(first_tile + tiles_per_run, tiles - 1)",
        ),
        heads_of_the_next_group=(
            "head = kv_head * group_size + tile // tiles",
            "head = kv_head + tile // tiles",
            "tests/test_gated_prefix.py -k 'within_budget and triton'",
        ),
        packed_rows_of_one_head=(
            "head = kv_head * group_size + tl.minimum(offs // q_len, group_size - 1)",
            "head = kv_head * group_size + offs * 0",
        ),
        packed_rows_of_the_last_position=(
            "offs_m = (offs % q_len).to(tl.int64)",
            "offs_m = tl.minimum(offs, q_len - 1).to(tl.int64)",
        ),
        zero_gate_adds_zero=(
            "            out = tl.where(factor != 0.0, out, base)",
            "            out = tl.where(factor == factor, out, base)",
            "tests/test_gated_prefix.py -k 'zero_gate and triton'",
        ),
        packed_zero_gate_adds_zero=(
            "out = tl.where((factor != 0.0)[:, None], out, base)",
            "out = tl.where((factor == factor)[:, None], out, base)",
            tests_named("zero_gate"),
        ),
        base_not_weighted=(
            "base.to(tl.float32) * (on_base / total)[:, None]",
            "base.to(tl.float32)",
            MERGES,
        ),
        prefix_not_weighted=(
            "acc * (factor * on_prefix / total)[:, None]",
            "acc * (factor / total)[:, None]",
            MERGES,
        ),
        a_base_without_keys_counts=(
            'visible = b != float("-inf")',
            "visible = b == b",
            "tests/test_prefix_attention.py -k 'saw_nothing and triton'",
        ),
        lse_of_the_tile_before=(
            "base_lse_ptr, BASE_LSE_STRIDES, row, tile + 1, kv_head",
            "base_lse_ptr, BASE_LSE_STRIDES, row, tile, kv_head",
            "tests/test_prefix_merge_triton.py -k several_tiles",
        ),
        lse_in_base_two=(
            "factor * (shift + tl.log(total))",
            "factor * (shift + tl.log2(total))",
            MERGES,
        ),
        int32_rows=(
            "row = (pid // (runs * num_kv_heads)).to(tl.int64)",
            "row = pid // (runs * num_kv_heads)",
            tests_named("32_bits"),
        ),
    ),
    *of_file(
        "kernels/prefix_term_backward.py",
        TESTS,
        delta_missing=("ds = p * (dp - delta[:, None])", "ds = p * dp"),
        delta_missing_over_several_blocks=(
            "dsn = tl.exp(s - lse[:, None]) * (dp - delta[:, None])",
            "dsn = tl.exp(s - lse[:, None]) * dp",
        ),
        delta_of_half_the_output=(
            "delta = tl.sum(o.to(tl.float32) * do_rows.to(tl.float32), axis=1)",
            "delta = 0.5 * tl.sum(o.to(tl.float32) * do_rows.to(tl.float32), axis=1)",
            GRADIENTS_OF_A_MERGE,
        ),
        softcap_slope_of_the_prefix_left_out=("ds = ds * slope", "ds = ds * 1.0", GRADIENTS_OF_A_MERGE),
        softcap_slope_of_the_query_left_out=("dsn = dsn * slope", "dsn = dsn * 1.0", GRADIENTS_OF_A_MERGE),
        lse_in_base_two=("lse = m_i + tl.log(l_i)", "lse = m_i + tl.log2(l_i)"),
        lse_of_the_visit_before=("lse_ptr, num_heads, visit + 1,", "lse_ptr, num_heads, visit,"),
        delta_of_the_visit_before=("delta_ptr, num_heads, visit + 1,", "delta_ptr, num_heads, visit,"),
        base_grad_dropped=(
            "dq += tl.load(base_ptrs, mask=mask_w, other=0.0).to(tl.float32)",
            "dq += 0.0 * tl.load(base_ptrs, mask=mask_w, other=0.0).to(tl.float32)",
            tests_named("gradient_of_a_base"),
        ),
        query_gradient_without_scale=("dq * (factor * softmax_scale)", "dq * factor"),
        last_row_of_the_query_gradient_not_written=(
            "mask_w = (offs_m < written_rows)",
            "mask_w = (offs_m < written_rows - 1)",
        ),
        key_gradient_without_scale=("dk * softmax_scale, mask=mask_pd", "dk, mask=mask_pd"),
        key_gradient_without_factor=(
            "tl.where(factor != 0.0, on_key * factor, 0.0)",
            "tl.where(factor != 0.0, on_key, 0.0)",
        ),
        value_gradient_without_factor=(
            "tl.where(factor != 0.0, on_value * factor, 0.0)",
            "tl.where(factor != 0.0, on_value, 0.0)",
        ),
        last_position_not_written=(
            "mask_pd = (first_p + offs_p < written_positions)",
            "mask_pd = (first_p + offs_p < written_positions - 1)",
        ),
        first_block_of_every_program=("first_p = (pid % num_blocks) * BLOCK_P", "first_p = pid * 0"),
        last_tile_of_a_slot_lost=(
            "tiles = tl.minimum(first_tile + tiles_per_slot, num_tiles) - first_tile",
            "tiles = tl.minimum(first_tile + tiles_per_slot, tl.maximum(num_tiles - 1, 1)) - first_tile",
        ),
        first_row_of_the_batch_for_all=(
            "row = first_row + tile // tiles_per_row",
            "row = first_row + 0 * (tile // tiles_per_row)",
        ),
        tanh_slope_missing=("slope = 1.0 - factor * factor", "slope = 1.0 + factor * 0.0"),
        gate_gradient_of_every_row=(
            "used = tl.load(row_ids_ptr + batch_row) == bank",
            "used = tl.load(row_ids_ptr + batch_row) >= 0",
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
        ),
    ),
]
