"""Mistakes in what joins adapters to models: folding, encoders' soft prompts, mixed batches, a shared softmax."""

from .record import of_file

FOLDING = "tests/integrations/test_folding.py"
ENCODER = "tests/integrations/test_soft_prompt_encoder.py tests/integrations/test_soft_prompt_rows.py"
ROWS = "tests/integrations/test_rows.py"
METHODS = "tests/integrations/test_methods.py"

INTEGRATIONS = [
    *of_file(
        "fastadapter/nn/channel_scale.py",
        FOLDING,
        folded_bias_is_not_scaled=("shift * scale\n", "shift\n"),
        folded_scale_of_the_other_side=(
            "new = weight.to(wide) * scale\n",
            "new = weight.to(wide) * scale.mean()\n",
        ),
    ),
    *of_file(
        "fastadapter/integrations/verbs/folding.py",
        FOLDING,
        originals_are_views=('.to("cpu", copy=True)', ".cpu()"),
        trained_stay_frozen=("        model.get_parameter(key).requires_grad_(True)\n", "        pass\n"),
        half_folded_after_an_error=(
            "            restore_weights(model, folded)\n            raise",
            "            raise",
        ),
        tied_weights_are_written=("    if others:\n", "    if False:\n"),
        overflow_is_written=("if not torch.isfinite(value).all():", "if False:"),
    ),
    *of_file(
        "fastadapter/integrations/passes/soft_prompt_encoder.py",
        ENCODER,
        filler_is_seen=(
            "visible = slots >= width - own",
            "visible = slots >= width * 0 - own",
        ),
        padding_gets_positions=("text = torch.where(own == self.padding, own, text)", "pass"),
        text_stays_at_its_positions=("text = own + moved_by", "text = own + 0 * moved_by"),
        prompt_sees_padding=("seen = mask.amax(2, keepdim=True)", "seen = torch.zeros_like(mask[:, :, :1])"),
        a_failed_pass_leaves_its_prompt=(
            "register_forward_hook(self._leave, always_call=True)",
            "register_forward_hook(self._leave)",
        ),
        hidden_states_keep_the_prompt=(
            "each if each is None or each.shape[1] == text_len else",
            "each if True else",
        ),
        tuples_are_forgotten=("return output.to_tuple() if run.as_tuple else output", "return output"),
    ),
    *of_file(
        "fastadapter/integrations/passes/host.py",
        ROWS,
        beams_are_not_repeated=("for _ in range(self.factor))", "for _ in range(1))"),
        a_kept_bank_outlives_its_sources=("if kept is None or kept[0] != now:", "if kept is None:"),
        rows_of_the_first_mix_are_kept=("key = (rows, device)", "key = device"),
    ),
    *of_file(
        "fastadapter/integrations/passes/shared_softmax.py",
        METHODS,
        causal_beside_a_mask=("mask is None and query.shape[2] > 1", "query.shape[2] > 1"),
        position_bias_lost=("    if bias is not None:\n", "    if False:\n", f"{METHODS} -m '' -k t5"),
        position_bias_without_gradient=("    if dropout or bias_gradient:", "    if dropout:"),
        no_attention_dropout=("    if dropout or bias_gradient:", "    if bias_gradient:"),
        scale_of_the_model_forgotten=(
            "softmax_scale=softmax_scale, softcap=softcap, row_ids",
            "softcap=softcap, row_ids",
        ),
    ),
]
