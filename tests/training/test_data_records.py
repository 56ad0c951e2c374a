"""Records to examples: kinds, columns, labels, instructions, turns of conversations; and what no record may be."""

import json

import pytest

from fastadapter.training import UserError, read_examples
from fastadapter.training.data import INSTRUCTION_TEMPLATE, Message


@pytest.fixture
def read(tmp_path):
    """The examples of records written as JSONL; their source is "line N"."""

    def examples(*records, **options):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_examples(path, **options)

    return examples


def turns(*said):
    return [{"role": role, "content": content} for role, content in said]


ASKED = turns(("user", "q"), ("assistant", "a"))


def test_labels_are_strings_integers_or_booleans(read):
    records = [{"text": "t", "label": label} for label in ("good", 3, True, False, -1, "3")]
    assert [example.label for example in read(*records)] == ["good", "3", "true", "false", "-1", "3"]
    assert read(records[1])[0].completion == " 3"


def test_labels_may_be_numbers(read):
    records = [{"text": "t", "label": label} for label in (3, 2.5, " 1e-3", "7")]
    assert [float(example.label) for example in read(*records, numbers=True)] == [3, 2.5, 0.001, 7]
    for label in ("good", True, "nan", "1e999", 10**400):
        with pytest.raises(
            UserError, match=r"line 1: field 'label' must be a finite number, got|a string, got bool"
        ):
            read({"text": "t", "label": label}, numbers=True)


def test_columns_are_renamed_and_decide_the_kind(read):
    record = {"question": "q", "answer": "a", "prompt": "other", "messages": ASKED}
    found = read(record, columns={"prompt": "question", "completion": "answer"})
    assert [(e.prompt, e.completion, e.messages) for e in found] == [("q", "a", None)]
    assert read(record, columns={"messages": "messages"})[0].completion == "a"
    assert read({"review": "r", "stars": 5}, columns={"text": "review", "label": "stars"})[0].label == "5"
    assert read({"task": "i", "output": "o"}, columns={"instruction": "task"})[0].completion == "o"
    both = {"prompt": "p", "completion": "c", "text": "t", "label": "l"}
    with pytest.raises(
        UserError, match="is a record of prompt/completion and text/label at once; columns can"
    ):
        read(both)
    assert read(both, columns={"text": "text"})[0].label == "l"
    # A record that is complete in one way is taken in that way, whatever else it has.
    assert read({"prompt": "p", "messages": ASKED})[0].messages is not None


@pytest.mark.parametrize("columns, message", [
    ({"answer": "a"}, "columns: a field is one of prompt, completion, .*, got 'answer'"),
    ({"prompt": ""}, "columns: the column of prompt must be a name, got ''"),
    ({"prompt": "p", "label": "c"}, "columns: no kind of record has the fields prompt, label"),
    ({"prompt": "q"}, r"line 1: has no field 'q' \(columns: prompt=q\); its fields are 'p', 'c'"),
    ({"prompt": "p"}, "line 1: field 'completion' is missing"),
])  # fmt: skip
def test_bad_columns_are_refused(read, columns, message):
    with pytest.raises(UserError, match=message):
        read({"p": "x", "c": "y"}, columns=columns)


def test_a_kind_that_columns_name_is_not_left(read):
    complete = {"prompt": "p", "completion": "c", "review": "r"}
    with pytest.raises(UserError, match="line 1: field 'label' is missing"):
        read(complete, columns={"text": "review"})


def test_instructions_get_the_template_of_alpaca(read):
    found = read(
        {"instruction": "Add {x}.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Sing.", "input": None, "output": "la"},
        {"instruction": "Sing.", "output": "la"},
    )
    assert found[0].prompt.endswith("### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:")
    assert "paired with an input" in found[0].prompt and found[0].completion == "3"
    assert {example.prompt for example in found[1:]} == {INSTRUCTION_TEMPLATE.format(text="Sing.")}
    for record, message in (
        ({"instruction": "i", "input": 3, "output": "o"}, "field 'input' must be a string, got int"),
        ({"instruction": "i", "input": " ", "output": "o"}, "field 'input' is empty"),
        ({"instruction": "i", "input": "x"}, "field 'output' is missing"),
        ({"instruction": "", "output": "o"}, "field 'instruction' is empty"),
        ({"instruction": ["i"], "output": "o"}, "field 'instruction' must be a string, got list"),
    ):
        with pytest.raises(UserError, match=f"line 1: {message}"):
            read(record)


def test_conversations_of_both_spellings(read):
    expected = (
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "r"),
        Message("assistant", "b"),
    )
    said = [turn._asdict() for turn in expected]
    found = read({"messages": said})[0]
    assert (found.messages, found.prompt, found.completion, found.label) == (expected, "user: q", "b", None)
    shared = [
        {"from": who, "value": turn.content} for who, turn in zip(["human", "gpt", "user", "model"], expected)
    ]
    assert read({"conversations": shared})[0].messages == expected
    assert read({"conversations": said})[0].messages == expected
    assert read({"dialog": shared}, columns={"messages": "dialog"})[0].messages == expected
    system = Message("system", "s")
    assert read({"messages": said, "system": "s"})[0].messages == (system, *expected)
    assert read({"messages": said}, system_prompt="s")[0].messages == (system, *expected)
    own = turns(("system", "own"))
    assert read({"messages": own + said}, system_prompt="s")[0].messages[0].content == "own"
    assert read({"messages": said, "system": "own"}, system_prompt="s")[0].messages[0].content == "own"
    assert read({"messages": said, "system": ""})[0].messages == expected


@pytest.mark.parametrize("field, value, message", [
    ("messages", [], "field 'messages' has no turns"),
    ("messages", None, "field 'messages' is missing"),
    ("messages", "hello", "field 'messages' must be a list of turns, got str"),
    ("messages", ["hello"], "turn 1 of 'messages' must be an object, got str"),
    ("messages", turns(("user", "q")), "no turn is the assistant's, so there is nothing to train on"),
    ("messages", turns(("assistant", "a")), "the first turn is the assistant's, and answers nothing"),
    ("messages", [*ASKED, {"role": "bot", "content": "x"}], "turn 3 of 'messages' has the unknown role 'bot'"),
    ("messages", turns(("human", "q"), ("gpt", "a")), "unknown role 'human'; known are system, user, assistant"),
    ("messages", [{"role": "user"}], "turn 1 of 'messages' has no 'content'; its fields are 'role'"),
    ("messages", [{"content": "x"}], "turn 1 of 'messages' has no 'from'; its fields are 'content'"),
    ("messages", turns(("user", " ")), "'content' of turn 1 of 'messages' is empty"),
    ("messages", turns(("user", ["part"])), "'content' of turn 1 of 'messages' must be a string, got list"),
    ("messages", turns(("user", "a\0")), "'content' of turn 1 of 'messages' holds a NUL"),
    ("messages", turns((["user"], "a")), "turn 1 of 'messages' has the unknown role"),
    ("messages", [{**ASKED[0], "weight": 0}, ASKED[1]], "turn 1 of 'messages' has 'weight', which is not supported"),
    ("messages", [ASKED[0], {**ASKED[1], "tool_calls": [{}]}], "turn 2 .* has 'tool_calls', which is not supported"),
    ("conversations", [{"from": "narrator", "value": "x"}], "has the unknown role 'narrator'; known are .*, human"),
    ("conversations", [{"from": "human", "value": None}], "turn 1 of 'conversations' has no 'value'"),
    ("conversations", {"from": "human"}, "must be a list of turns, got dict"),
    ("conversations", [{"from": "human", "value": 3}], "'value' of turn 1 of 'conversations' must be a string"),
    ("conversations", [{"from": "gpt", "value": "a"}], "the first turn is the assistant's"),
])  # fmt: skip
def test_broken_conversations_are_named(read, field, value, message):
    good = {field: ASKED}
    with pytest.raises(UserError, match=f"line 2: .*{message}"):
        read(good, {field: value})


@pytest.mark.parametrize("first, second, message", [
    ({"messages": ASKED}, {"prompt": "p", "completion": "c"}, "a prompt/completion record in a file of messages"),
    ({"prompt": "p", "completion": "c"}, {"text": "t", "label": "l"}, "a text/label record in a file of prompt"),
    ({"instruction": "i", "output": "o"}, {"instruction": "i"}, "field 'output' is missing"),
    ({"text": "t", "label": "l"}, {"text": "t", "label": None}, "field 'label' is missing"),
    ({"text": "t", "label": "l"}, {"text": "t", "label": {}}, "field 'label' must be a string, got dict"),
])  # fmt: skip
def test_one_file_holds_one_kind(read, first, second, message):
    with pytest.raises(UserError, match=f"line 2: {message}"):
        read(first, second)
