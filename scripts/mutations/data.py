"""Mistakes in what is read and in what becomes of it."""

from .record import of_file

FORMATS = "tests/training/test_data_formats.py"
RECORDS = "tests/training/test_data_records.py"
CHAT = "tests/training/test_data_chat.py"
SPECIAL = "tests/training/test_data_special.py"

DATA = [
    *of_file(
        "fastadapter/training/data/readers.py",
        FORMATS,
        a_line_is_read_whole=("file.readline(limit + 2)", "file.readline()"),
        half_characters_pass=('    if "\\\\ud" in text or "\\\\uD" in text:\n', '    if "\\\\ud" in text:\n'),
        open_quotes_swallow_the_file=("            size += length\n", ""),
        fields_have_the_limit_of_csv=("        csv.field_size_limit(limit)", "        pass"),
        lines_of_a_list_are_forgotten=(
            '            self.lines += self.buffer.count("\\n", 0, self.at)\n',
            "",
        ),
        a_cut_value_is_malformed=("                if not cut or self.ended:", "                if True:"),
    ),
    *of_file(
        "fastadapter/training/data/arrow.py",
        FORMATS,
        classes_count_from_one=("    return names[value]", "    return names[value - 1]"),
        a_large_record_passes=("if part.num_rows == 1 and part.nbytes > limit:", "if False:"),
        groups_are_read_whatever_their_size=(" + _OVERHEAD * group.num_columns:", " + 2**40:"),
    ),
    *of_file(
        "fastadapter/training/data/records.py",
        RECORDS,
        columns_do_not_decide=(
            "found = wanted or _kind(record, kind, source)",
            "found = _kind(record, kind, source)",
        ),
        the_first_of_two_kinds=("    if len(complete) > 1:", "    if False:"),
        booleans_by_number=("        return str(value).lower()  #", "        return str(int(value))  #"),
        infinite_numbers_pass=("finite = math.isfinite(float(value))", "finite = bool(float(value) + 1)"),
        input_is_left_out=('    if given is None or given == "":', "    if True:"),
    ),
    *of_file(
        "fastadapter/training/data/chat.py",
        CHAT,
        the_opening_is_trained_on=(
            "spans.append((len(opening), ended",
            "spans.append((len(opening) - 1, ended",
        ),
        white_space_behind_the_end_too=("ended.end(1) if ended else", "ended.end() if ended else"),
        only_the_last_answer=(
            "        for start, end in spans:\n",
            "        for start, end in spans[-1:]:\n",
        ),
        marks_are_not_looked_at=(
            "self._marked if _MARKS.search(self.template.text)",
            "self._marked if False",
        ),
        what_was_said_is_parsed=("if at % 2 else part, at % 2 == 0)", "if at % 2 else part, True)"),
        other_turns_may_change_it=("text.startswith(through) and ", ""),
        weights_are_ignored=("if turn.get(name) not in harmless:", "if False:", RECORDS),
    ),
    *of_file(
        "fastadapter/training/data/tokens.py",
        SPECIAL,
        special_tokens_are_parsed=('    return {"split_special_tokens": True}', "    return {}"),
        what_cannot_be_split_passes=("        if kept:\n", "        if False:\n"),
        a_space_in_the_middle=(
            "shown = [text if at == 0 else f",
            "shown = [text if True else f",
            CHAT,
        ),
    ),
    *of_file(
        "fastadapter/training/data/encoding.py",
        CHAT,
        the_first_token_is_trained_on=("    trained[0] = False", "    pass"),
        the_begin_token_is_cut=(
            "head = 1 if ids[0] == tokenizer.bos_token_id else 0",
            "head = 0",
        ),
        given_turns_are_forgotten=("            given.append((at, stop))\n", "            pass\n"),
        any_end_is_taken_away=(
            "    return eos if ids and ids[-1] == eos and eos != tokenizer.bos_token_id else None",
            "    return eos",
            SPECIAL,
        ),
    ),
    *of_file(
        "fastadapter/training/batching.py",
        CHAT,
        others_turns_are_targets=(
            "supervised = example.supervised",
            "supervised = range(example.prompt_len, length)",
        ),
    ),
]
