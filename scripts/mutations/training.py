"""Mistakes in tasks, targets and the comparison."""

from .record import of_file

VALUES = "tests/training/test_classification.py -k 'one_text_at_a_time or more_classes'"
REFUSED = "tests/training/test_classification.py -k 'refused'"
PACKING = "tests/training/test_packing.py -k 'not many_steps'"
COMPARE = "tests/compare -k 'read_back or another_comparison or embeddings or strength or table'"

LAST = "tests/training/test_last_feed_forward.py tests/training/test_class_tokens.py"

TRAINING = [
    *of_file(
        "fastadapter/training/last_feed_forward.py",
        LAST,
        others_do_not_see_all_tokens=("any(map(_is_watched, block.modules()))", "False"),
        random_numbers_are_others=(
            "return not _drops(block.get_submodule(name))",
            "return block.get_submodule(name) is not None",
        ),
        what_drops_by_now_is_spared=(
            "tuple(place for place in known[block.training][1] if place in places)",
            "known[block.training][1]",
        ),
        every_thread_is_this_one=(
            "        if threading.get_ident() != thread:\n            return None\n",
            "",
        ),
        the_mode_of_a_part_does_not_count=("class_of(each), each.training, ", "class_of(each), "),
        it_is_tried_once=(" or known[block.training][0] != parts", ""),
        another_forward_is_the_same=('_reference(each.__dict__.get("forward"))', "None"),
        all_or_nothing_of_a_block=("dict.fromkeys((places, places[:1]))", "(places,)"),
        the_mode_is_all_the_same=("if block.training not in known or", "if not known or"),
        a_prompt_in_front_is_not_seen=(" or (columns > seq and not self.joined)", " or columns > seq"),
        a_prompt_in_front_is_not_counted=("(self.positions // seq + 1) * (columns - seq)", "0"),
        mixed_rows_are_cut=(" or by_row()", ""),
        recomputed_layers_are_cut=(
            "return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None",
            "return False",
        ),
        a_proof_without_sparing_counts=(
            "    if fill is not None and len(wanted.spared) != len(places):\n",
            "    if False:\n",
        ),
        the_proof_is_seen=("if any(map(_is_watched, owner.modules())):", "if False:"),
        leaks_are_not_seen=("same and torch.equal(outcomes[1], outcomes[2])", "same"),
        the_proof_draws_numbers=(
            "    finally:\n        _put_back(generators)\n",
            "    finally:\n        pass\n",
        ),
        the_proof_begins_where_the_pass_does=(
            "contextvars.Context().run(_proves, owner, block, probe(), joined, places)",
            "_proves(owner, block, probe(), joined, places)",
        ),
        compiled_models_are_hooked=("and _is_plain(model):", "and True:"),
    ),
    *of_file(
        "fastadapter/training/class_tokens.py",
        LAST,
        the_last_token_may_be_padding=("if token != pad_token_id)", "if True)"),
        every_head_reads_the_first=("_last[owner] = looks_back_only(owner)", "_last[owner] = False"),
        who_only_answers_is_hooked=("if not torch.is_grad_enabled():", "if False:"),
        prompts_are_never_in_front=("joined=not last", "joined=False"),
    ),
    *of_file(
        "fastadapter/training/classification.py",
        VALUES,
        padding_is_shown=("        mask[number, : len(ids)] = 1\n", "        mask[number] = 1\n"),
        padding_hides_nothing_from_pooling=(
            "torch.full((len(texts), width), pad_token_id,",
            "torch.full((len(texts), width), pad_token_id + 1,",
        ),
        scores_in_the_order_of_length=(
            "            found[chunk] = logits.double()",
            "            found[start : start + len(chunk)] = logits.double()",
        ),
        classes_without_a_label_can_win=(".logits[:, :classes]", ".logits"),
        one_class_is_enough=("    if len(names) == 1:\n", "    if not names:\n", REFUSED),
        unknown_held_out_class_passes=(
            "    require_known_labels(held_out, names)\n    return names\n",
            "    return names\n",
            REFUSED,
        ),
        context_is_not_looked_at=(
            "    limit = text_limit(model, tokenizer, config)\n",
            "    limit = None\n",
            REFUSED,
        ),
    ),
    *of_file(
        "fastadapter/training/targets.py",
        "tests/training/test_classification.py -k 'named_parameters or last_layers or refused or together'",
        a_block_too_few=(
            "sorted(numbers)[len(numbers) - blocks :]",
            "sorted(numbers)[len(numbers) - blocks + 1 :]",
        ),
        nothing_is_frozen=("parameter.requires_grad_(name in chosen)", "parameter.requires_grad_(True)"),
        freezing_stays=("parameter.requires_grad_(before[name])", "pass"),
        an_adapter_is_overlooked=("if attachments(model) is not None:", "if False:"),
    ),
    *of_file(
        "fastadapter/compare/run.py",
        COMPARE,
        other_settings_are_mixed=(
            "different = _differences(found, settings, compared)",
            "different = _differences(found, settings, [])",
        ),
        other_rates_are_mixed=("if key not in _FREE and", "if key == 'method' and"),
        finished_runs_run_again=("return (folder / RESULT).exists()", "return False"),
    ),
    *of_file(
        "fastadapter/compare/baselines.py",
        COMPARE,
        mean_over_the_padding=("/ mask.sum(1, keepdim=True)", "/ mask.shape[1]"),
        strength_is_fixed=(
            '{"logisticregression__C": STRENGTHS}',
            '{"logisticregression__C": STRENGTHS[2:3]}',
        ),
    ),
    *of_file(
        "fastadapter/training/packing.py",
        PACKING,
        positions_of_a_pack_go_on=(
            "        position_ids += range(len(example.input_ids))\n",
            "        position_ids += range(len(position_ids), len(position_ids) + len(example.input_ids))\n",
        ),
        targets_of_a_pack_one_late=("starts[-1] + at - 1 for at", "starts[-1] + at for at"),
        packs_are_never_full=("            if tokens > self.pack_length:\n", "            if False:\n"),
        a_pack_begins_with_what_the_last_held=("                tokens = self.lengths[row]\n", ""),
        every_model_can_be_packed=("    if found <= allowed:\n", "    if True:\n"),
    ),
]
