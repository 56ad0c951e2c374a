"""Mistakes in the C++ kernels and in what carries them."""

from .cpp_bottleneck import BOTTLENECK_CPP
from .record import of_file

GATED_PREFIX_CPP = (
    "tests/test_gated_prefix.py tests/test_gated_prefix_cpp.py "
    "-k 'not triton and not reference and not instruction_set'"
)

FROZEN = "tests/test_frozen_ops.py -k 'not instruction_set'"
PREPARED = "tests/test_prepared.py"

CPP = [
    *of_file(
        "csrc/frozen_kernel.cpp",
        FROZEN,
        accumulators_are_never_emptied=("          level[j - 1][k][p] = Part{};\n", ""),
        sums_in_another_order=(
            "for (int k = 1; k < kStreams; ++k) {",
            "for (int k = kStreams - 1; k > 0; --k) {",
        ),
        eps_missing=("/ static_cast<float>(n) + eps)", "/ static_cast<float>(n))"),
        turned_the_other_way=("product(-x2, s1)", "product(x2, s1)"),
        turned_back_as_forward=("-product(x1, s1)", "product(x1, s1)"),
        products_of_rotary_are_fused=("return through<E>(rounded(a * b)); };", "return a * b; };"),
        normed_is_not_rounded=("through<E>(get<E>(row, j, lanes) * r)", "(get<E>(row, j, lanes) * r)"),
        gradient_of_the_root_missing=("(g - get<E>(row, j, lanes) * share) * r", "g * r"),
        gate_without_up=("grad * get<E>(op.up, j, lanes) * act.slope", "grad * act.slope"),
    ),
    *of_file(
        "csrc/bottleneck.cpp",
        PREPARED,
        other_sizes_are_read_as_the_prepared_ones=("if (!(layout_ == x)) {", "if (false) {"),
        residual_of_the_first_call=("    op.residual = op.x;\n    op.out = view_of", "    op.out = view_of"),
    ),
    *of_file(
        "csrc/scaled_linear.cpp",
        PREPARED,
        weight_of_the_first_call=("weight_.data_ptr() == data_ ?", "true ?"),
        scale_by_input_too=("!by_input_ && j < end", "j < end"),
        own_bias_is_forgotten=("    if (own_bias_) {\n", "    if (false) {\n"),
    ),
    *of_file(
        "csrc/gated_prefix.cpp",
        PREPARED,
        query_of_the_first_call=("    op.query.data = static_cast<char*>(query->data_ptr());\n", ""),
    ),
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
            "        if (f[k] == 0) std::memset(s.row + k * dim, 0, dim * sizeof(C));\n"
            "        if (true) {\n          add_row",
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
            "(rows + kRowsPerItem - 1) / kRowsPerItem);",
            "(rows + kRowsPerItem - 1) / kRowsPerItem + batch_ % 2);",
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

ATTENTION_TESTS = "tests/test_attention_ops.py -k 'within_budget and cpp'"


def attention_tests(words):
    return f"tests/test_attention_ops.py -k '{words} and cpp'"


CPP += [
    *of_file(
        "csrc/attention_tiles.h",
        ATTENTION_TESTS,
        causal_shows_the_next_key=(
            "keys.end = min(keys.end, end);",
            "keys.end = min(keys.end, end + 1);",
        ),
        window_one_wider=("begin - op.window + 1));", "begin - op.window));"),
        boolean_mask_dropped=("dst[j] = mask[j * stride] ? C(0) :", "dst[j] = true ? C(0) :"),
        softcap_after_the_mask=(
            "      if (score.softcap != 0) x = score.softcap * tanh(x / score.softcap);\n"
            "      if (mask) x += load(mask + j);\n      store",
            "      if (mask) x += load(mask + j);\n"
            "      if (score.softcap != 0) x = score.softcap * tanh(x / score.softcap);\n      store",
        ),
        no_max_subtraction=(
            "const C shift = top == kNever ? C(0) : top;",
            "const C shift = C(0);",
            attention_tests("large_logits"),
        ),
        nothing_visible_yet=(
            "const C shift = top == kNever ? C(0) : top;",
            "const C shift = top;",
            attention_tests("see_no_key"),
        ),
        earlier_blocks_not_shrunk=("sum = sum * shrink + sum_lanes", "sum = sum + sum_lanes"),
        columns_outside_not_cleared=(
            "  clear_outside(s, whole, width);\n  const C shrink",
            "  const C shrink",
        ),
        softcap_of_the_gated_prefix=(
            "softcap = of_prefix && op.mode == Mode::kGated ? C(0) : static_cast<C>(op.softcap);",
            "softcap = static_cast<C>(op.softcap);",
        ),
    ),
    *of_file(
        "csrc/attention_kernel.cpp",
        ATTENTION_TESTS,
        rows_share_a_mask=("block.t + r, begin);", "block.t, begin);"),
        gated_term_not_normalised=("const C weight = factor / s.prefix.sum[r];", "const C weight = factor;"),
        lse_without_the_sum=("top + std::log(sum);\n  if (op.wide", "top;\n  if (op.wide"),
        unadapted_rows_attend_entry_zero=(
            "  if (sequence.slot < 0) return false;\n",
            "",
            attention_tests("without_an_adapter"),
        ),
        few_rows_use_the_first_head=(
            "kv_head * op.group + r / sequence.q_len,\n                         sequence.first",
            "kv_head * op.group,\n                         sequence.first",
            "tests/test_attention_cpp.py -k few_query_rows",
        ),
        value_rows_of_the_key_stride=(
            "value + begin * value_view.stride[2], count",
            "value + begin * key_view.stride[2], count",
            "tests/test_attention_cpp.py -k different_layouts",
        ),
    ),
    *of_file(
        "csrc/attention_backward_kernel.cpp",
        ATTENTION_TESTS,
        delta_missing_under_a_mask=(
            "p == 0 ? Vec<C>{} : p * (load(grad + j) - delta) * slope",
            "p == 0 ? Vec<C>{} : p * load(grad + j) * slope",
        ),
        softcap_slope_dropped=("        slope -= bounded * bounded;\n", ""),
        hidden_keys_let_nan_through=(
            "p == 0 ? Vec<C>{} : p * (load(grad + j) - delta) * slope",
            "p * (load(grad + j) - delta) * slope",
            "tests/test_attention_cpp.py -k hidden_key",
        ),
        gate_factor_missing=("const Vec<C> p = load(s + j) * factor;", "const Vec<C> p = load(s + j);"),
        query_gradient_without_scale=(
            "                 s.grad_query, static_cast<C>(op.scale), s.rows);",
            "                 s.grad_query, C(1), s.rows);",
        ),
    ),
]

CPP += BOTTLENECK_CPP
