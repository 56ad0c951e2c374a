"""Mistakes in the Triton kernels of the bottleneck."""

from .record import of_file

TESTS = "tests/test_bottleneck_triton.py -k within_budget"


def tests_named(words):
    return f"tests/test_bottleneck_triton.py -k '{words}'"


BOTTLENECK = [
    *of_file(
        "kernels/bottleneck.py",
        TESTS,
        scale_missing=("term = (acc + bias[None, :]) * scale", "term = acc + bias[None, :]"),
        residual_twice=(
            "(residual.to(tl.float32) + term).to(out_dtype)",
            "(2.0 * residual.to(tl.float32) + term).to(out_dtype)",
        ),
        zero_term_is_added=(
            "total = tl.where(term == 0.0, residual, (residual",
            "total = tl.where(term != term, residual, (residual",
            tests_named("bits_of_the_residual"),
        ),
        last_chunk_of_the_hidden_lost=(
            "        mask_r = (offs_r < BOTTLENECK_SIZE)[None, :]\n",
            "        mask_r = (offs_r < BOTTLENECK_SIZE - 1)[None, :]\n",
        ),
        without_an_adapter_adds_the_bias=(
            "term = tl.where(adapted, term, fill)",
            "term = tl.where(adapted, term, fill + term)",
            tests_named("without_an_adapter"),
        ),
        down_bias_missing=(
            "return _activate(acc + bias[None, :], ACTIVATION)",
            "return _activate(acc, ACTIVATION)",
        ),
    ),
    *of_file(
        "kernels/bottleneck_tiles.py",
        TESTS,
        eps_missing=("squares / HIDDEN_SIZE + norm_eps", "squares / HIDDEN_SIZE"),
        mean_dropped=("xhat = (xhat - mean[:, None]) * rstd[:, None]", "xhat = xhat * rstd[:, None]"),
        variance_of_blocks_not_merged=("+ delta * delta * (seen * share)", ""),
        rows_of_the_next_tile=(
            "t = (tile % tiles_per_row).to(tl.int64) * BLOCK_M + offs_m",
            "t = (tile % tiles_per_row).to(tl.int64) * (BLOCK_M + 1) + offs_m",
        ),
        int32_rows=(
            "b = (tile // tiles_per_row).to(tl.int64) + tl.zeros((BLOCK_M,), tl.int64)",
            "b = tile // tiles_per_row + tl.zeros((BLOCK_M,), tl.int32)",
            tests_named("32_bits"),
        ),
        int32_positions=(
            "t = (tile % tiles_per_row).to(tl.int64) * BLOCK_M + offs_m",
            "t = tile % tiles_per_row * BLOCK_M + offs_m",
            tests_named("32_bits"),
        ),
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
    *of_file(
        "kernels/bottleneck_backward.py",
        TESTS,
        scale_missing=(
            "dh = tl.where(scale != 0.0, dh * scale, 0.0)",
            "dh = tl.where(scale != 0.0, dh, 0.0)",
        ),
        up_bias_halved=("d_up_bias * scale, mask=mask_c", "d_up_bias * scale * 0.5, mask=mask_c"),
        mean_of_the_layer_norm_dropped=(
            "dy -= tl.load(parts, mask=mask_m, other=0.0)[:, None] / HIDDEN_SIZE",
            "dy -= 0.0",
        ),
        norm_weight_not_applied=(
            "                    if HAS_NORM_WEIGHT:\n                        dy *= weight[None, :]\n",
            "",
        ),
        norm_bias_not_subtracted=("z -= by_bias[None, :]", "z -= 0.0 * by_bias[None, :]"),
        grad_out_not_added=(
            "dx = tl.where(term == 0.0, do, (do.to(tl.float32) + term).to(dx_dtype))",
            "dx = tl.where(term == 0.0, do, term.to(dx_dtype))",
        ),
        last_tile_of_a_slot_lost=(
            "last_tile = tl.minimum(first_tile + tiles_per_slot, num_tiles)",
            "last_tile = tl.minimum(first_tile + tl.maximum(tiles_per_slot - 1, 1), num_tiles)",
            tests_named("many_rows"),
        ),
        reduce_adds_every_row=("mask=mask_b, other=-1) == entry)", "mask=mask_b, other=-1) >= 0)"),
    ),
]
