"""Mistakes in the Triton kernels of both attention ops and of decoding."""

from .record import of_file

TESTS = "tests/test_attention_triton.py -k within_budget"
FAR = "tests/test_attention_triton.py -k 32_bits"
LARGE = "tests/test_attention_triton.py -k huge_logits"
DECODE = "tests/test_decode_triton.py -k within_budget"

ATTENTION = [
    *of_file(
        "kernels/attention.py",
        TESTS,
        causal_hides_its_own_key=(
            "visible = visible & (offs_n <= offs_m)",
            "visible = visible & (offs_n < offs_m)",
        ),
        window_one_wider=(
            "visible = visible & (offs_n > offs_m - window)",
            "visible = visible & (offs_n >= offs_m - window)",
        ),
        mask_dropped=("visible = visible & (given != 0)", "visible = visible & (given == given)"),
        float_mask_in_base_two=(
            "s += given.to(tl.float32)",
            "s += given.to(tl.float32) * 1.4426950408889634",
        ),
        softcap_slope_dropped=("slope = 1.0 - t * t", "slope = 1.0"),
        whole_tiles_reach_past_the_diagonal=(
            "full_high = tl.minimum(full_high, (first + 1) // BLOCK_N * BLOCK_N)",
            "full_high = tl.minimum(full_high, (first + BLOCK_M) // BLOCK_N * BLOCK_N)",
        ),
        window_starts_a_tile_late=(
            "low = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N",
            "low = tl.cdiv(tl.maximum(first - window + 1, 0), BLOCK_N) * BLOCK_N",
        ),
        whole_tiles_before_the_window=(
            "full_low = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N",
            "full_low = low",
        ),
        accumulator_not_rescaled=(
            "acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)",
            "acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)",
        ),
        packed_tile_of_another_sequence=("tile -= first // BLOCK + seq", "tile -= first // BLOCK"),
        packed_boundary_off_by_one=(
            "return first, tl.minimum(last, total) - first",
            "return first, tl.minimum(last + 1, total) - first",
        ),
        lse_in_base_two=(
            "tl.store(lse_ptr + lse_offs, m_i + tl.log(some), mask=mask_m)",
            "tl.store(lse_ptr + lse_offs, m_i + tl.log2(some), mask=mask_m)",
        ),
        lse_rounded_once_more=(
            "tl.store(lse_ptr + lse_offs, m_i + tl.log(some), mask=mask_m)",
            "tl.store(lse_ptr + lse_offs, (m_i * 1.44269504 + tl.log2(some)) * 0.693147181, mask=mask_m)",
            LARGE,
        ),
        minus_one_attends_entry_zero=(
            "return row_id, entry, (row_id >= 0) & (row_id < num_prefixes)",
            "return row_id, entry, row_id < num_prefixes",
        ),
        prefix_tail_not_masked=(
            '        s = tl.where(mask_p[None, :], s, float("-inf"))\n        acc, m_i, l_i',
            "        acc, m_i, l_i",
        ),
        int32_rows=("return row.to(tl.int64), head", "return row, head", FAR),
        gated_term_without_gate=("weight = factor / tl.where(", "weight = 1.0 / tl.where("),
    ),
    *of_file(
        "kernels/attention_tiles.py",
        FAR,
        int32_positions=("offs.to(tl.int64)[:, None] * STRIDES[2]", "offs[:, None] * STRIDES[2]"),
    ),
    *of_file(
        "kernels/attention_backward.py",
        TESTS,
        keys_without_delta=("ds = p * (dp - delta[None, :]) * slope", "ds = p * dp * slope"),
        keys_without_softcap_slope=(
            "ds = p * (dp - delta[None, :]) * slope",
            "ds = p * (dp - delta[None, :])",
        ),
        query_without_softcap_slope=(
            "ds = p * (dp - delta[:, None]) * slope",
            "ds = p * (dp - delta[:, None])",
        ),
        key_gradient_without_scale=("(dk * softmax_scale)", "(dk)"),
        queries_of_the_diagonal_lost=(
            "low = first // BLOCK_M * BLOCK_M",
            "low = tl.cdiv(first, BLOCK_M) * BLOCK_M + BLOCK_M",
        ),
        window_ends_a_key_early=(
            "high = tl.minimum(high, first + BLOCK_N - 1 + window)",
            "high = tl.minimum(high, first + window - 1)",
        ),
        whole_tiles_past_the_window=(
            "full_high = tl.minimum(full_high, (first + window) // BLOCK_M * BLOCK_M)",
            "full_high = full_high",
        ),
        keys_of_one_query_head=(
            "for member in range(group_size):\n        head = kv_head * group_size + member\n        q_ptrs",
            "for member in range(1):\n        head = kv_head * group_size + member\n        q_ptrs",
        ),
    ),
    *of_file(
        "kernels/attention_prefix_backward.py",
        TESTS,
        delta_of_half_the_output=(
            "delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)",
            "delta = 0.5 * tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)",
        ),
        prefix_gradient_of_one_head=("for member in range(group_size):", "for member in range(1):"),
        cap_slope_of_the_prefix_dropped=(
            "weights * (dp - delta[:, None]) * cap, 0.0)",
            "weights * (dp - delta[:, None]), 0.0)",
        ),
        packed_slot_of_another_sequence=(
            "(slot - (begin // (tiles_per_slot * BLOCK_M) + seq)) * tiles_per_slot",
            "(slot - begin // (tiles_per_slot * BLOCK_M)) * tiles_per_slot",
        ),
    ),
    *of_file(
        "kernels/decode.py",
        DECODE,
        causal_hides_its_own_key=(
            "visible & (offs_n[None, :] <= offs_t[:, None])",
            "visible & (offs_n[None, :] < offs_t[:, None])",
        ),
        window_one_wider=(
            "visible & (offs_n[None, :] > offs_t[:, None] - window)",
            "visible & (offs_n[None, :] >= offs_t[:, None] - window)",
        ),
        last_split_lost=(
            "for start in range(0, num_splits, BLOCK_S):",
            "for start in range(0, num_splits - 1, BLOCK_S):\n        mask_t = start < num_splits",
        ),
        splits_not_weighted=("weights = tl.exp(m_n - shift)", "weights = tl.exp(m_n * 0.0)"),
        gate_missing=(
            "out = _normalised(acc, l_i) + factor * (acc_p / l_p)",
            "out = _normalised(acc, l_i) + acc_p / l_p",
        ),
        minus_one_attends_entry_zero=(
            "attends = row_id != -1",
            "attends = row_id == row_id",
            "tests/test_decode_triton.py -k without_an_adapter",
        ),
        softcap_of_the_prefix_dropped=(
            "            if HAS_SOFTCAP and not GATED:\n                s = softcap * _tanh(s / softcap)\n",
            "",
        ),
        int32_rows=(
            "row = (pid_bh // num_kv_heads).to(tl.int64)",
            "row = (pid_bh // num_kv_heads).to(tl.int32)",
            "tests/test_decode_triton.py -k beyond_32_bits",
        ),
    ),
]
