"""Records, splits and tokens: the values by hand, and every complaint names the file and the line."""

import json
from pathlib import Path

import pytest

from fastadapter.training import (
    Example,
    UserError,
    encode_examples,
    label_completions,
    read_examples,
    split_examples,
    without_prompts_of,
)
from tests.training.toy import WORDS, make_examples, make_tokenizer


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def words(encoded):
    return [WORDS[token] for token in encoded.input_ids]


def test_jsonl_and_csv_of_both_kinds_are_read(tmp_path):
    pairs = read_examples(
        write(tmp_path, "a.jsonl", '\ufeff{"prompt": "p", "completion": " c", "id": 3}\n\n')
    )
    assert pairs == [Example("p", " c", None, f"{tmp_path / 'a.jsonl'} line 1")]
    csv = 'label,text\npositive,"one, ""two""\nthree"\n\nnegative,four\n'
    reviews = read_examples(
        write(tmp_path, "b.CSV", csv), template="<{text}>", completion_template="={label}"
    )
    assert [(e.prompt, e.completion, e.label) for e in reviews] == [
        ('<one, "two"\nthree>', "=positive", "positive"),
        ("<four>", "=negative", "negative"),
    ]
    assert [e.source.rpartition(" ")[2] for e in reviews] == ["2", "5"]
    default = read_examples(write(tmp_path, "c.jsonl", '{"text": "{x}", "label": "good"}'))
    assert (default[0].prompt, default[0].completion) == ("Review: {x}\nSentiment:", " good")


GOOD = '{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", GOOD + '{"prompt": "p", ', "line 2: malformed JSON"),
        ("a.jsonl", GOOD + '["prompt"]', "line 2: expected a JSON object, got list"),
        ("a.jsonl", "[" * 200_000, "line 1"),
        ("a.jsonl", GOOD + '{"prompt": "p"}', "line 2: field 'completion' is missing"),
        ("a.jsonl", GOOD + '{"prompt": null, "completion": "c"}', "line 2: field 'prompt' is missing"),
        ("a.jsonl", GOOD + '{"prompt": 1, "completion": "c"}', "line 2: field 'prompt' must be a string, got int"),
        ("a.jsonl", '{"prompt": "p", "completion": " "}', "line 1: field 'completion' is empty"),
        ("a.jsonl", '{"prompt": "p", "prompt": "q", "completion": "c"}', "line 1.*field 'prompt' occurs twice"),
        ("a.jsonl", '{"text": "t"}', "line 1: field 'label' is missing"),
        ("a.jsonl", '{"question": "t"}', "line 1: is no record of .*; its fields are 'question'; columns can"),
        ("a.jsonl", '{"prompt": "p", "label": "l"}', "line 1: is no record of .*; its fields are 'prompt', 'label'"),
        ("a.jsonl", GOOD + '{"text": "t", "label": "l"}', "line 2: a text/label record in a file of prompt/completion"),
        ("a.jsonl", "", "holds no records"),
        ("a.jsonl", "\n \n", "holds no records"),
        ("a.jsonl", GOOD.encode() + b'{"prompt": "\xff"}', "line 2: not UTF-8"),
        ("a.csv", "text,label\nx,good\ny\n", "line 3: has 1 fields, the header 2"),
        ("a.csv", "text,text\nx,good\n", "line 1: a column name occurs twice"),
        ("a.csv", 'text,label\n"x,good\n', "line 2: malformed CSV"),
        ("a.csv", "text,label\n,good\n", "line 2: field 'text' is empty"),
        ("a.csv", "text,label\n", "holds no records"),
        ("a.txt", "PAR1", "expected a name that ends in .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_the_line(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(UserError, match=message) as error:
        read_examples(path)
    assert str(path) in str(error.value)


def test_missing_files_and_bad_templates_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        (tmp_path / "folder.jsonl").mkdir()
        read_examples(tmp_path / "folder.jsonl")
    path = write(tmp_path, "a.jsonl", GOOD)
    for template in ("no field", "{text} {label}", "{text.__class__}", "{text", "{}"):
        with pytest.raises(UserError, match="template"):
            read_examples(path, template=template)


def test_split_is_exact_seeded_and_keeps_equal_prompts_together():
    examples = make_examples(40)
    examples += [Example(e.prompt, e.completion, e.label, "copy") for e in examples[:10]]
    train, held_out = split_examples(examples, 15, seed=1)
    assert len(held_out) == 15 and len(train) == 35
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert (train, held_out) == split_examples(examples, 15, seed=1)
    assert held_out != split_examples(examples, 15, seed=2)[1]
    for count in (0, 50, -1):
        with pytest.raises(UserError, match="between 1 and 49"):
            split_examples(examples, count, 0)
    with pytest.raises(UserError, match="cannot hold out 1"):
        split_examples([examples[0]] * 3, 1, 0)


def test_prompts_of_held_out_examples_are_left_out_of_training():
    examples = make_examples(6)
    assert without_prompts_of(examples, examples[:2]) == examples[2:]
    with pytest.raises(UserError, match="every training prompt"):
        without_prompts_of(examples[:2], examples)


def test_labels_have_one_completion_each():
    assert label_completions(make_examples(20)) == {"bad": " bad", "good": " good"}
    assert label_completions(make_examples(3, labelled=False)) == {}
    with pytest.raises(UserError, match="share a completion"):
        label_completions([Example("p", "x", "a"), Example("p", "x", "b")])
    with pytest.raises(UserError, match="two different completions"):
        label_completions([Example("p", "x", "a"), Example("p", "y", "a")])


def test_tokens_of_prompt_and_completion():
    tokenizer = make_tokenizer()
    plain, ended = (
        encode_examples(tokenizer, [Example("Review: w1", " very good")], append_eos=eos)[0]
        for eos in (False, True)
    )
    assert words(plain) == ["Review", ":", "w1", "very", "good"]
    assert (plain.prompt_len, plain.num_supervised, ended.num_supervised) == (3, 2, 3)
    assert words(ended)[-1] == "</s>"
    # "w1" + "2" would be one token behind the prompt: the prompt keeps the tokens that generate gives it.
    straddling = encode_examples(tokenizer, [Example("Review: w1", "2 good")])[0]
    assert words(straddling) == ["Review", ":", "w1", "?", "good"] and straddling.prompt_len == 3


def test_special_tokens_around_the_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    special = [(token, WORDS.index(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    encoded = encode_examples(tokenizer, [Example("w1 w2 w3", " good")])[0]
    assert words(encoded) == ["<s>", "w1", "w2", "w3", "good"] and encoded.prompt_len == 4
    cut = encode_examples(tokenizer, [Example("w1 w2 w3", " good")], max_length=4, truncation="prompt")[0]
    assert words(cut) == ["<s>", "w2", "w3", "good"] and cut.prompt_len == 3


def test_what_does_not_fit_is_refused_unless_truncation_is_asked_for():
    tokenizer = make_tokenizer()
    example = Example("w1 w2 w3 w4", " good bad", source="x.jsonl line 7")
    with pytest.raises(
        UserError, match=r"x.jsonl line 7: prompt and completion have 6 tokens, at most 5 fit"
    ):
        encode_examples(tokenizer, [example], max_length=5)
    cut = encode_examples(tokenizer, [example], max_length=4, truncation="prompt")[0]
    assert words(cut) == ["w3", "w4", "good", "bad"] and cut.num_supervised == 2
    with pytest.raises(UserError, match="its completion alone fills that"):
        encode_examples(tokenizer, [example], max_length=2, truncation="prompt")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode_examples(tokenizer, [example], append_eos=True)


def test_json_lines_round_trip(tmp_path):
    examples = make_examples(5, labelled=False)
    text = "".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in examples)
    again = read_examples(write(tmp_path, "a.jsonl", text))
    assert [(e.prompt, e.completion) for e in again] == [(e.prompt, e.completion) for e in examples]


def test_the_example_file_is_read():
    examples = read_examples(Path(__file__).parents[2] / "examples" / "reviews.jsonl")
    assert len(examples) == 32 and label_completions(examples) == {
        "negative": " negative",
        "positive": " positive",
    }
