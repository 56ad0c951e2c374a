"""Mistakes in what joins adapters to models: folding, encoders' soft prompts, mixed batches, a shared softmax."""

from .record import of_file

FOLDING = "tests/integrations/test_folding.py"
ENCODER = "tests/integrations/test_soft_prompt_encoder.py tests/integrations/test_soft_prompt_rows.py"
ROWS = "tests/integrations/test_rows.py"
METHODS = "tests/integrations/test_methods.py"
KEPT = "tests/integrations/test_kept.py"
SHORTCUT = "tests/integrations/test_shortcut.py"
FROZEN_PARTS = "tests/integrations/test_frozen_parts.py"
ROTARY = "tests/integrations/test_rotary.py"
PRODUCTS = "tests/training/test_products.py"
PACKED = "tests/integrations/test_packed_rows.py"

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
        tied_weights_are_written=("    if others:\n", "    if False:\n"),
        overflow_is_written=("if not torch.isfinite(value).all():", "if False:"),
    ),
    *of_file(
        "fastadapter/integrations/passes/soft_prompt_encoder.py",
        ENCODER,
        padding_gets_positions=("text = torch.where(own == self.padding, own, text)", "pass"),
        text_stays_at_its_positions=("text = own + moved_by", "text = own + 0 * moved_by"),
        a_failed_pass_leaves_its_prompt=(
            "register_forward_hook(self._leave, always_call=True)",
            "register_forward_hook(self._leave)",
        ),
    ),
    *of_file(
        "fastadapter/integrations/passes/soft_prompt.py",
        ENCODER,
        filler_is_seen=("visible = slots >= width - own", "visible = slots >= width * 0 - own"),
        prompt_sees_padding=("seen = mask.amax(2, keepdim=True)", "seen = torch.zeros_like(mask[:, :, :1])"),
        hidden_states_keep_the_prompt=(
            "each if each is None or each.shape[1] == text_len else",
            "each if True else",
        ),
        tuples_are_forgotten=("return output.to_tuple() if run.as_tuple else output", "return output"),
    ),
    *of_file(
        "fastadapter/integrations/passes/shortcut.py",
        SHORTCUT,
        hooks_of_others_are_passed_by=(" and hooks == host.HOOKS:", ":"),
        steps_outlive_their_pass=("run.stamp is step.stamp and hooks", "hooks"),
    ),
    *of_file(
        "fastadapter/integrations/passes/frozen_parts.py",
        FROZEN_PARTS,
        bits_are_not_compared=("torch.equal(found[0], expected[0]) and", "True and"),
        gradients_are_not_compared=(".abs().max().item() <= tolerance", ".abs().max().item() <= 1e9"),
        trained_norms_lose_their_gradient=(
            "            if not weight.requires_grad:\n",
            "            if True:\n",
        ),
        classes_stay=("        take_away(module, _FeedForward)\n", "        pass\n"),
    ),
    *of_file(
        "fastadapter/integrations/passes/scaled_linear.py",
        SHORTCUT,
        hooks_of_others_are_passed_by_too=(
            '                    and len(inside["_forward_hooks"]) + len(inside["_forward_pre_hooks"]) == host.HOOKS\n',
            "",
        ),
        replaced_forward_is_passed_by=('                    and "forward" not in inside\n', ""),
        exchanged_weight_is_not_noticed=(
            '                    and parameters["weight"] is ready.weight\n',
            "",
        ),
        autocast_is_not_noticed=('                    and not torch.is_autocast_enabled("cpu")\n', ""),
        bits_are_not_looked_at=("if torch.equal(prepared.repeat(x, of), expected):", "if True:"),
    ),
    *of_file(
        "fastadapter/integrations/passes/rotary.py",
        ROTARY,
        every_function_is_taken=("            if not _proves(space[_NAME]):\n", "            if False:\n"),
        taken_from_other_models=("if not users and hasattr", "if hasattr"),
        angles_lose_their_gradient=("if not (cos.requires_grad or sin.requires_grad):", "if True:"),
    ),
    *of_file(
        "fastadapter/integrations/passes/products.py",
        PRODUCTS,
        trained_layers_lose_their_gradient=("if not (frozen and plain) or", "if not plain or"),
        gradient_of_the_weight_itself=(
            "_multiply(grad, weight.t()), None, None",
            "_multiply(grad, weight), None, None",
        ),
        autocast_is_ignored=(' or torch.is_autocast_enabled("cpu")', ""),
    ),
    *of_file(
        "fastadapter/integrations/passes/choice.py",
        ROWS,
        beams_are_not_repeated=("for _ in range(self.factor))", "for _ in range(1))"),
        stamps_are_never_asked_for=("state.store.stamp(choice) if keeps", "state.store if keeps", KEPT),
    ),
    *of_file(
        "fastadapter/integrations/passes/kept.py",
        KEPT,
        written_values_are_not_noticed=(
            "            and list(map(_version, self._tensors)) == self._versions\n",
            "",
        ),
        exchanged_parameters_are_not_noticed=(
            "all(map(operator.is_, map(dict.get, self._holders, self._names), self._tensors))",
            "True",
        ),
        exchanged_modules_are_not_noticed=(
            "            and all(map(operator.is_, map(dict.get, self._parents, self._children), self._objects))\n",
            "",
        ),
        steps_outlive_what_they_hold=("            self._stamps = {}\n            with", "            with"),
        the_later_of_two_sources_counts=(", id(row[2]), *row[3:]): row", "): row"),
    ),
    *of_file(
        "fastadapter/integrations/passes/host.py",
        ROWS,
        a_kept_bank_outlives_its_sources=("if kept is None or not kept.is_valid:", "if kept is None:", KEPT),
        rows_of_the_first_mix_are_kept=("key = (rows, device)", "key = device"),
    ),
    *of_file(
        "fastadapter/integrations/passes/shared_softmax.py",
        METHODS,
        causal_beside_a_mask=("        and mask is None\n        and query", "        and query"),
        position_bias_lost=("    if bias is not None:\n", "    if False:\n", f"{METHODS} -m '' -k t5"),
        position_bias_without_gradient=("    if dropout or bias_gradient:", "    if dropout:"),
        no_attention_dropout=("    if dropout or bias_gradient:", "    if bias_gradient:"),
        scale_of_the_model_forgotten=(
            "softmax_scale=softmax_scale, softcap=softcap, row_ids",
            "softcap=softcap, row_ids",
        ),
    ),
    *of_file(
        "fastadapter/integrations/passes/packed.py",
        PACKED,
        windows_of_packed_rows_forgotten=('options.get("sliding_window")\n    if base', "None\n    if base"),
        offsets_are_believed=("return True, mask.dtype == torch.bool and", "return True, True or"),
        sequences_that_see_each_other_pass=(
            "and (compared is None or not compared.apart)",
            "and compared is None",
        ),
        packed_rows_without_attention_dropout=(
            "    if dropout or not is_plain(options):",
            "    if not is_plain(options):",
        ),
    ),
    *of_file(
        "fastadapter/integrations/passes/attention.py",
        PACKED,
        scale_of_packed_rows_forgotten=(
            'by_sequences, query, key, value, sequences, kwargs.get("scaling"))',
            "by_sequences, query, key, value, sequences, None)",
        ),
    ),
]
