"""Mistakes in the C++ kernels and in what carries them."""

from .record import of_file

GATED_PREFIX_CPP = (
    "tests/test_gated_prefix.py tests/test_gated_prefix_cpp.py -k 'not triton and not reference'"
)

CPP = [
    *of_file(
        "csrc/gated_prefix_kernel.cpp",
        GATED_PREFIX_CPP,
        no_max_subtraction=("exp(load(p + i * ldp) - top)", "exp(load(p + i * ldp) - top * 0)"),
        maximum_of_first_slot=("    top = s > top ? s : top;\n", ""),
        last_run_of_the_normaliser_lost=(
            "for (int64_t first = 0; first < slots; first += kRun) {",
            "for (int64_t first = 0; first == 0 || first + kRun <= slots; first += kRun) {",
        ),
        zero_gate_adds_zero=(
            "        if (f[k] != 0) {\n          add_row",
            "        if (true) {\n          if (f[k] == 0) std::memset(s.row + k * dim, 0, dim * sizeof(C));\n          add_row",
        ),
        rows_share_the_first_gate=(
            "        f[k] = factor[rows.group];\n        active |= f[k] != 0;\n        s.query_rows",
            "        f[k] = factor[0];\n        active |= f[k] != 0;\n        s.query_rows",
        ),
        backward_without_delta=(
            "scale * w * (load(dp + j * kBlock) - delta)",
            "scale * w * load(dp + j * kBlock)",
        ),
        ds_without_scale=("const Vec<C> ds = scale * w * (", "const Vec<C> ds = w * ("),
        zero_factor_lets_nan_through=(
            "store(dp + j * kBlock, fk == 0 ? Vec<C>{} : ds)",
            "store(dp + j * kBlock, ds)",
        ),
        dv_without_gate=(
            "const Vec<C> fk = load(f + k), weight = fk * inverse;",
            "const Vec<C> fk = load(f + k), weight = (fk == 0 ? fk : Vec<C>{} + C(1)) * inverse;",
        ),
        dk_of_first_block_only=(
            "product<C>(slots, n, s.dp, kBlock, 1, s.query_rows, dim, dk, dim, true)",
            "if (r == item.begin) product<C>(slots, n, s.dp, kBlock, 1, s.query_rows, dim, dk, dim, true)",
        ),
        gate_gradient_of_one_head=("delta_sum[group[k + m]] += delta[m]", "delta_sum[0] += delta[m]"),
        reduce_skips_a_part=(
            "part < op.first_item[pair + 1]; ++part",
            "part < op.first_item[pair + 1]; part += 2",
        ),
        value_rows_of_the_key_stride=("p * op.value_stride[2]);", "p * op.key_stride[2]);"),
        packed_bank_by_id=("(op.key_packed ? item.entry : id)", "(op.key_packed ? id * 0 : id)"),
        reduce_writes_by_position=(
            "op.entry_id[pair / op.kv_heads] * grad.stride[0]",
            "pair / op.kv_heads * grad.stride[0]",
        ),
        clear_forgets_the_last_token=(
            "for (int64_t t = 0; t < op.q_len; ++t)\n      store_row",
            "for (int64_t t = 0; t + 1 < op.q_len; ++t)\n      store_row",
        ),
        int32_row_offset=(
            "x.data + *batch_row * x.stride[0]",
            "x.data + static_cast<int32_t>(*batch_row * x.stride[0])",
            "tests/test_gated_prefix_cpp.py -m slow -k beyond_32_bits",
        ),
    ),
    *of_file(
        "csrc/gated_prefix.cpp",
        GATED_PREFIX_CPP,
        tanh_slope_missing=("tanh ? 1.0 - f * f : 1.0", "1.0"),
        gate_gradient_in_place_of_entry=("grad[op.entry_id[e] * op.heads + h]", "grad[e * op.heads + h]"),
        unused_entries_unwritten=(
            "if (call.op.num_entries < call.num_prefixes() || call.items() == 0) {",
            "if (call.items() == 0) {",
        ),
        parts_by_the_batch=(
            "const int64_t rows = (op.entry_begin[e + 1] - op.entry_begin[e]) * op.group * op.q_len;\n      const int64_t parts = std::min(most_parts,",
            "const int64_t rows = (op.entry_begin[e + 1] - op.entry_begin[e]) * op.group * op.q_len;\n      const int64_t parts = std::min(most_parts + 0 * batch_, 1 + batch_ % 2 + 0 *",
        ),
        bank_used_unpadded=("op.padded_dim == op.head_dim) {", "true) {"),
        gate_of_first_column=("data[op.entry_id[e] * row + h * column]", "data[op.entry_id[e] * row + h]"),
    ),
    *of_file(
        "csrc/host.h",
        GATED_PREFIX_CPP,
        ids_not_sorted_stably=(
            "if (row_id[rows[i]] == last) continue;",
            "if (row_id[rows[i]] <= last + 1 && last >= 0) continue;",
        ),
        ids_below_minus_one_accepted=("row_id[i] >= -1 && row_id[i] < bank_size", "row_id[i] < bank_size"),
        ids_beyond_the_bank_accepted=(
            "row_id[i] >= -1 && row_id[i] < bank_size",
            "row_id[i] >= -1 && row_id[i] <= bank_size",
        ),
        minus_one_is_entry_zero=(
            "row_id[i] = data[i * ids->stride(0)];",
            "row_id[i] = std::max(0, data[i * ids->stride(0)]);",
        ),
    ),
    *of_file(
        "csrc/rows.h",
        GATED_PREFIX_CPP,
        tail_of_a_row_not_padded=(
            "  E part[kLanes<C>] = {};\n",
            "  E part[kLanes<C>];\n  std::memset(part, 0xff, sizeof(part));\n",
        ),
        tail_of_a_row_not_stored=(
            "for (; j < n; j += W) store_some<C, E>(row + j * stride, stride, n - j, load(src + j));",
            "",
        ),
        base_added_twice=(
            "load(reinterpret_cast<const E*>(base_row) + j) + load(term + j)",
            "load(reinterpret_cast<const E*>(base_row) + j) * C(2) + load(term + j)",
        ),
    ),
]
