"""Mistakes in the C++ bottleneck: forward, backward, and the input of the activation that is kept between them."""

from .record import of_file

FILES = "tests/test_bottleneck.py tests/test_bottleneck_cpp.py"
TESTS = f"{FILES} -k 'cpp and not threads and not instruction_set'"


def tests_named(words):
    return f"{FILES} -k '({words}) and cpp and not instruction_set'"


KEPT_Z = "tests/test_bottleneck_cpp.py -k 'kept_z or saving or wrong_form'"

BOTTLENECK_CPP = [
    *of_file(
        "csrc/bottleneck_kernel.cpp",
        TESTS,
        zero_term_is_added=(
            "const Vec<C> o = term == 0 ? kept : kept + term;",
            "const Vec<C> o = kept + term;",
        ),
        scale_missing=(
            "(sum[i][v] + bias[v]) * scale;\n        const Vec<C> kept",
            "(sum[i][v] + bias[v]);\n        const Vec<C> kept",
        ),
        residual_twice=("term == 0 ? kept : kept + term;", "term == 0 ? kept : kept * C(2) + term;"),
        zero_rows_of_up_not_looked_for=("  if (!any(bad)) return;\n", "  return;\n"),
        bias_alone_counts_as_nothing=("if (zero && bias.data) zero =", "if (!zero && bias.data) zero ="),
        z_of_rows_without_an_adapter_unwritten=("    if (op.kept_z.data)\n", "    if (false)\n", KEPT_Z),
    ),
    *of_file(
        "csrc/bottleneck_rows.h",
        TESTS,
        padding_counts_in_the_variance=(
            "  for (int64_t j = op.hidden; j < op.padded_hidden; ++j) y[j] = 0;\n",
            "",
            tests_named("odd_sizes"),
        ),
        eps_missing=("/ count + static_cast<C>(op.norm_eps));", "/ count);"),
        z_is_kept_after_the_activation=(
            "store_width<C, C>(kept + j, op.size - j, z);",
            "store_width<C, C>(kept + j, op.size - j, activate<C, activation.value>(z).value);",
        ),
        given_z_gets_the_bias_again=(
            "given ? load_width<C, C>(given + j, op.size - j) :",
            "given ? load_width<C, C>(given + j, op.size - j) + load(s.down_bias + j) :",
        ),
        packed_weights_of_another_entry=(
            "op.packed[form] + slot * op.packed_bytes[form]",
            "op.packed[form] + 0 * slot",
            tests_named("blocks or mixed or other_rows or threads or kept_z"),
        ),
    ),
    *of_file(
        "csrc/bottleneck_products.h",
        tests_named("long_rows"),
        one_long_chain=("constexpr int64_t kChain = 64;", "constexpr int64_t kChain = 1 << 30;"),
    ),
    *of_file(
        "csrc/bottleneck_backward_kernel.cpp",
        TESTS,
        scale_missing=("load(grad_z + j) * scale;", "load(grad_z + j);"),
        slope_missing=(
            "      if (op.activation != Activation::kIdentity) value *= load(s.slope + j);\n",
            "",
        ),
        grad_out_not_added=(
            "                      if (op.add_grad_out && left > 0) value += "
            "load_width<C, C>(grad[first + i] + at, left);\n",
            "",
        ),
        grad_out_not_added_beside_a_norm=(
            "      if (op.add_grad_out && j < op.hidden) value += "
            "load_width<C, C>(grad[k] + j, op.hidden - j);\n",
            "",
        ),
        mean_of_the_layer_norm_dropped=(
            "op.norm == Norm::kLayer ? sum_row(grad_y, padded) / columns : C(0);",
            "C(0);",
        ),
        slope_of_the_norm_dropped=("- shift - normed * slope) * inverse", "- shift) * inverse"),
        norm_weight_not_applied=("g * load(s.norm_weight + j);", "g;"),
        rows_that_pass_are_cleared=(
            "    if (op.add_grad_out) {\n      copy_row",
            "    if (false) {\n      copy_row",
        ),
        kept_rows_of_the_first_entry=(
            "(op.entry_begin[entry] - op.entry_begin[0]) * op.q_len + first;",
            "first;",
        ),
        rows_after_the_first_run_lost=(
            "(weights || biases) && first < total; first += kBottleneckRun",
            "(weights || biases) && first < min(total, kBottleneckRun); first += kBottleneckRun",
        ),
        strip_by_the_statistics_of_its_first_row=(
            "(v - statistics[2 * k]) * statistics[2 * k + 1];",
            "(v - statistics[0]) * statistics[1];",
        ),
        norm_gradient_of_the_first_block=(
            "block < op.first_block[entry + 1]; ++block",
            "block < op.first_block[entry] + 1; ++block",
        ),
        up_bias_without_scale=(
            "strip.begin, width, op.scale, s.totals);",
            "strip.begin, width, 1.0, s.totals);",
        ),
        up_weight_without_scale=("weights ? scale * sums[r * kPanel<C>]", "weights ? sums[r * kPanel<C>]"),
        weights_of_the_bank_by_position=(
            "op.grad_down.data + id * op.grad_down.stride[0]",
            "op.grad_down.data + strip.entry * op.grad_down.stride[0]",
        ),
    ),
    *of_file(
        "csrc/bottleneck.cpp",
        TESTS,
        unused_entries_unwritten=(
            "op.num_entries < down_weight.size(0) || call.rows() == 0;",
            "call.rows() == 0;",
        ),
        zero_up_lets_nan_through=("op.scale != 0 && any_nonzero(e);", "op.scale != 0;"),
        negative_zero_contributes=("(half & 0x7fff) != 0", "half != 0", tests_named("zero_up")),
        identity_needs_no_hidden_layer=(
            "need_weights || op.activation != Activation::kIdentity;",
            "op.activation != Activation::kIdentity;",
        ),
        rows_without_an_adapter_get_no_gradient=("    if (add_grad_out) op.residual = op.grad_out;", "    ;"),
        biases_alone_get_no_strip=(
            "need_weights, need_weights || need_biases,",
            "need_weights, need_weights,",
        ),
        z_of_any_layout_accepted=(
            "call.compute_type() && z->is_contiguous())",
            "call.compute_type())",
            KEPT_Z,
        ),
    ),
    *of_file(
        "csrc/activations.h",
        tests_named("activations or gradcheck"),
        relu_slope_at_negative=("{z <= 0 ? zero : z, z > 0 ? one : zero}", "{z <= 0 ? zero : z, one}"),
        gelu_slope_without_density=(
            "z * n.value * C(0.39894228040143267794) + n.slope}",
            "z * n.value * C(0) + n.slope}",
        ),
        gelu_tanh_inner_slope=("square * C(3 * 0.044715) + C(1)", "square * C(0.044715) + C(1)"),
        far_tanh_of_the_wrong_sign=("x < 0 ? -far : far", "far"),
    ),
]
