"""Mistakes in the Triton kernels of the bottleneck."""

from .record import of_file

TESTS = "tests/test_bottleneck_triton.py -k within_budget"


def tests_named(words):
    return f"tests/test_bottleneck_triton.py -k '{words}'"


BOTTLENECK = [
    *of_file(
        "kernels/bottleneck_wide.py",
        TESTS,
        scale_of_the_bias_missing=("    bias *= scale\n", ""),
        scale_of_the_hidden_missing=("_activate(z, ACTIVATION) * scale", "_activate(z, ACTIVATION)"),
        scale_of_the_gradient_missing=("dz = dh * scale * _activation", "dz = dh * _activation"),
        residual_twice=("(residual.to(tl.float32) + acc)", "(2.0 * residual.to(tl.float32) + acc)"),
        a_channel_without_a_term_is_added=(
            "used = tl.maximum(used, tl.max((w != 0.0).to(tl.int32), axis=0))",
            "used += 1",
            tests_named("bits_of_the_residual"),
        ),
        an_unreached_entry_is_added=(
            "    if PARTS > 0:\n",
            "    if PARTS < 0:\n",
            tests_named("zero_up_projection"),
        ),
        gradient_of_the_up_bias_not_scaled=("(summed * scale).to(dtype)", "summed.to(dtype)"),
        gradient_of_the_up_projection_shifted=("* WIDTH + offs % SIZE", "* WIDTH + (offs + 1) % SIZE"),
        nothing_below_is_not_zero=("if reached == 0:", "if reached < 0:", tests_named("zero_up_projection")),
        one_part_of_the_up_projection_is_looked_at=(
            "(offs_u < part) & (first + offs_u < UP_SIZE)",
            "(pid == 0) & (offs_u < part) & (first + offs_u < UP_SIZE)",
            tests_named("small_part_of_the_up"),
        ),
        without_an_adapter_adds=(
            "acts *= adapted.to(tl.int32)",
            "acts *= 1",
            tests_named("without_an_adapter"),
        ),
        a_wrong_id_is_silent=(
            'bias = tl.where(wrong, float("nan"), bias)',
            "bias = tl.where(wrong, 0.0, bias)",
            tests_named("outside_the_bank"),
        ),
        last_hidden_columns_lost=("mask_k = start + offs_k < SIZE\n", "mask_k = start + offs_k < SIZE - 1\n"),
        last_tile_of_a_run_lost=(
            "last = tl.minimum(first + tiles_per_run, ",
            "last = tl.minimum(first + tl.maximum(tiles_per_run - 1, 1), ",
            tests_named("several_tiles"),
        ),
        int32_rows=(
            "row = (pid // (num_blocks * runs)).to(tl.int64)",
            "row = pid // (num_blocks * runs)",
            tests_named("32_bits"),
        ),
        int32_positions=(
            "offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)",
            "offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)",
            tests_named("32_bits"),
        ),
    ),
    *of_file(
        "kernels/bottleneck.py",
        TESTS,
        down_bias_missing=("weight.mT, dtype, bias)", "weight.mT, dtype, None)"),
        grad_out_missing_behind_a_norm=(
            "total = chain if kept is None else kept + chain",
            "total = chain",
        ),
        kept_z_is_not_used=(
            "        elif not z_is_dense:\n            z = z.contiguous()",
            "        else:\n            z = z.contiguous() * 2",
            tests_named("is_kept"),
        ),
    ),
    *of_file(
        "kernels/bottleneck_norm.py",
        TESTS,
        eps_missing=("norms.square() / x.shape[-1] + eps", "norms.square() / x.shape[-1]"),
        bias_not_folded=(
            "bias = added if bias is None else bias + added",
            "bias = added if bias is None else bias",
        ),
        weight_not_unfolded=("times(grad_down, norm_weight.float()[:, None])", "grad_down"),
        bias_not_unfolded=("grad = grad + times(of_bias, norm_bias.float()[:, None])", "grad = grad + 0.0"),
        zero_times_nan=(
            "return torch.where(grad == 0, 0.0, grad * parameter)",
            "return grad * parameter",
            tests_named("without_an_adapter"),
        ),
        mean_square_dropped=(
            "wide - found.values * (wide * found.values)",
            "wide - 0 * (wide * found.values)",
        ),
    ),
    *of_file(
        "kernels/bottleneck_rows.py",
        TESTS,
        down_bias_missing=("HAS_DOWN_BIAS)[None, :]", "False)[None, :]"),
        rows_of_the_next_tile=(
            "offs_m = (tile % tiles_per_row).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)",
            "offs_m = (tile % tiles_per_row).to(tl.int64) * (BLOCK_M + 1) + tl.arange(0, BLOCK_M)",
        ),
        up_bias_halved=("d_up_bias * scale, mask", "d_up_bias * scale * 0.5, mask"),
        last_tile_of_a_slot_lost=(
            "last = tl.minimum(first + TILES, ",
            "last = tl.minimum(first + tl.maximum(TILES - 1, 1), ",
            tests_named("many_rows"),
        ),
        a_zero_entry_learns_below=(
            "dd = tl.where(tl.load(reached_ptr + entry) != 0, dd, 0.0)",
            "dd = dd + 0.0",
            tests_named("zero_entry_among_others"),
        ),
        reduce_adds_every_row=("other=-1) == entry\n", "other=-1) >= 0\n"),
    ),
    *of_file(
        "kernels/activation.py",
        tests_named("activations_over_their_range"),
        relu_slope_at_negative=(
            "slope = tl.where(z <= 0.0, 0.0, 1.0)",
            "slope = tl.where(z <= 0.0, 1.0, 1.0)",
        ),
        gelu_slope_without_density=("+ z * density", "+ 0.0 * density"),
        gelu_tanh_inner_slope=("0.134145 * square", "0.044715 * square"),
        silu_slope=("slope = s * (1.0 + z * (1.0 - s))", "slope = s * (1.0 + z * s)"),
    ),
]
