"""``fastadapter generate``: options against transformers' own, batches against single prompts, files that go on."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastadapter as fa
from fastadapter.cli import answers
from fastadapter.cli.answers import Answerer, _before, _possible_start
from fastadapter.training import UserError
from fastadapter.training.data import Message
from tests.cli.conftest import read_lines
from tests.training.toy import CONTEXT, make_model, make_tokenizer

PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8", "w9 w10 w11", "w12"]


def theirs(folder, prompt, adapter=None, **options):
    """What transformers answers to one prompt, by its own options."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer()
    if adapter:
        fa.load(model, adapter)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ends = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=ends,
        **options,
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{each}\n" for each in PROMPTS))
    return path


@pytest.fixture
def ask(model_folder, tmp_path, fastadapter):
    """Answer with options, and return the records."""

    def call(*words, model=model_folder):
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*.jsonl')))}.jsonl"
        where = ("--model", model) if model else ()
        status, _, err = fastadapter("generate", *where, "--max-new-tokens", 6, "--output", out, *words)
        assert status == 0, err
        return read_lines(out)

    return call


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"repetition_penalty": 5.0, "min_new_tokens": 6},
        {"no_repeat_ngram_size": 1},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_options_are_those_of_transformers(ask, prompts, model_folder, options):
    """In batches padded on the left, whose padding no penalty may see."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    records = ask("--file", prompts, "--batch-size", 3, *words)
    expected = [theirs(model_folder, each, max_new_tokens=6, do_sample=False, **options) for each in PROMPTS]
    assert [record["completion"] for record in records] == [text for each in expected for text in each]
    assert [record["prompt"] for record in records[:: len(expected[0])]] == PROMPTS


@pytest.mark.parametrize(
    "name, value", [("top_k", 1), ("top_p", 1e-6), ("min_p", 1.0), ("temperature", 1e-6)]
)
def test_drawing_from_one_token_is_greedy(ask, prompts, name, value):
    greedy = [record["completion"] for record in ask("--file", prompts)]
    drawn = ask("--file", prompts, "--do-sample", f"--{name.replace('_', '-')}", value)
    assert [record["completion"] for record in drawn] == greedy


def test_draws_depend_on_the_seed_and_the_place_alone(ask, prompts, tmp_path):
    words = ("--do-sample", "--temperature", 3, "--batch-size", 2, "--num-return-sequences", 2)
    whole = [record["completion"] for record in ask("--file", prompts, *words)]
    assert len(whole) == 10 and len(set(whole)) > 8
    assert [record["completion"] for record in ask("--file", prompts, *words)] == whole
    assert [record["completion"] for record in ask("--file", prompts, *words, "--seed", 1)] != whole


@pytest.mark.parametrize(
    "words, message",
    [
        (("--do-sample", "--temperature", "1e-40"), "--temperature must be at least 1e-06, at most 1e+06 (beyond"),
        (("--do-sample", "--temperature", "0"), "--temperature must be at least 1e-06"),
        (("--do-sample", "--temperature", "nan"), "--temperature must be at least"),
        (("--do-sample", "--temperature", "1e39"), "--temperature must be at least"),
        (("--do-sample", "--top-p", "0"), "--top-p must be above 0, at most 1, got 0"),
        (("--do-sample", "--top-k", "-1"), "--top-k must be at least 0"),
        (("--do-sample", "--min-p", "1.5"), "--min-p must be at least 0, at most 1"),
        (("--do-sample", "--typical-p", "0"), "--typical-p must be above 0"),
        (("--top-k", "5"), "--top-k needs --do-sample"),
        (("--repetition-penalty", "0"), "--repetition-penalty must be above 0"),
        (("--no-repeat-ngram-size", "-1"), "--no-repeat-ngram-size must be at least 0"),
        (("--num-beams", "0"), "--num-beams must be at least 1"),
        (("--min-new-tokens", "65"), "--min-new-tokens 65 is more than --max-new-tokens 64"),
        (("--length-penalty", "2"), "--length-penalty needs --num-beams"),
        (("--num-return-sequences", "2"), "--num-return-sequences 2 needs --do-sample, or --num-beams"),
        (("--do-sample", "--num-beams", "2", "--num-return-sequences", "3"), "more than --num-beams 2"),
        (("--num-beams", "2", "--cache-implementation", "static"), "static does not go with --num-beams"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--stop", ""), "--stop must not be empty"),
        (("--resume",), "--resume needs --output"),
        (("--json", "--output", "x"), "give one of them"),
        (("--system-prompt", "w1"), "--system-prompt needs --chat or --apply-chat-template"),
        (("--max-new-tokens", "half"), "--max-new-tokens: invalid int value: 'half'"),
        (("--template", "{text} {label}"), "--template must hold {text} and no other field"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_impossible_options_are_named(model_folder, refused, monkeypatch, words, message):
    monkeypatch.setattr("fastadapter.cli.generate.load_base", None)
    assert message in refused("generate", "--model", model_folder, "--prompt", "w1", *words)


def test_answers_end_before_a_stop_text(ask, prompts, model_folder, fastadapter):
    whole = ask("--file", prompts)
    words = whole[0]["completion"].split()
    stop = f"{words[2]} {words[3]}"
    stopped = ask("--file", prompts, "--stop", "never", "--stop", stop)
    for before, after in zip(whole, stopped, strict=True):
        assert after["completion"] == before["completion"].split(stop)[0]
    assert stopped[0]["finish_reason"] == "stop" and stopped[0]["new_tokens"] < whole[0]["new_tokens"]
    beams = [ask("--file", prompts, "--num-beams", 2, *more) for more in ((), ("--stop", words[0]))]
    assert not any(words[0] in record["completion"] for record in beams[1])
    # word by word, on stdout
    options = ("--model", model_folder, "--prompt", PROMPTS[0], "--max-new-tokens", 6, "--stop", stop)
    assert fastadapter("generate", *options)[1] == stopped[0]["completion"] + "\n"


def test_what_may_become_a_stop_text_is_held_back():
    assert _before("a b. c! d", ("!", ".")) == ("a b", True) and _before("a", ("b",)) == ("a", False)
    assert [_possible_start(text, ("\nUser:", "END")) for text in ("a", "a\n", "a\nUs", "aE", "aEN", "aENE")] == [
        0, 1, 3, 1, 2, 1
    ]  # fmt: skip
    told = []
    streamer = answers._streamer(make_tokenizer(), ("w2 w3",), told.append)
    streamer.put(torch.tensor([[5]]))  # the prompt
    for token in (1, 2, 4, 2, 3, 5):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(told) == "w1 w2 w4 "


def test_every_token_that_ends_an_answer_ends_it():
    model, tokenizer = make_model(), make_tokenizer()
    free = Answerer(
        model, tokenizer, {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    )
    ((answer,),) = free.answer([free.encode("here", "w1 w2")])
    model.generation_config.eos_token_id = [7, tokenizer(answer["completion"])["input_ids"][3]]
    ends = Answerer(model, tokenizer, free.options)
    ((shorter,),) = ends.answer([ends.encode("here", "w1 w2")])
    assert answer["finish_reason"] == "length" and shorter["finish_reason"] == "eos"
    assert shorter["new_tokens"] <= 4 and answer["completion"].startswith(shorter["completion"])


# What the folder of an adapter knows


def test_the_folder_of_an_adapter_says_all(ask, run, model_folder):
    told = ask("--adapter", run, "--prompt", "w1 w2", model=None)
    assert told[0]["completion"] == theirs(model_folder, "w1 w2", run, max_new_tokens=6)[0]


def test_its_template_is_used_and_said(ask, save_run, model_folder, tmp_path, fastadapter):
    folder = save_run(make_model(), model_folder, template="Review: {text}\nSentiment:")
    (own,) = ask("--adapter", folder, "--prompt", "w1", model=None)
    assert own["prompt"] == "Review: w1\nSentiment:"
    (plain,) = ask("--adapter", folder, "--prompt", "w1", "--template", "{text}", model=None)
    assert plain["prompt"] == "w1"
    words = ("generate", "--adapter", folder, "--prompt", "w1", "--max-new-tokens", 1)
    err = fastadapter(*words)[2]
    assert err.count("\n") == 1 and "prompts are put into 'Review: {text}\\nSentiment:', as" in err
    err = fastadapter(*words, "--template", "w2 {text}")[2]
    assert "--template 'w2 {text}' in place of 'Review: {text}\\nSentiment:', with which" in err
    assert fastadapter(*words, "--template", r"Review: {text}\nSentiment:")[2] == ""


def test_another_model_is_said(run, model_folder, tmp_path, fastadapter):
    make_model().save_pretrained(tmp_path / "again")
    make_tokenizer().save_pretrained(tmp_path / "again")
    words = ("generate", "--adapter", run, "--prompt", "w1", "--max-new-tokens", 1)
    status, _, err = fastadapter(*words, "--model", tmp_path / "again")
    assert status == 0 and f"--model {tmp_path / 'again'} in place of {model_folder}, on which {run}" in err
    assert fastadapter(*words, "--model", model_folder)[2] == ""


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base": {"name": "/nowhere/model"}}, "was trained on /nowhere/model, which is not there any more"),
        ({"base": {"name": None}}, "--model is needed; "),
        (
            {"task": "classification", "labels": ["a", "b"]},
            "was trained for classification; `fastadapter classify`",
        ),
        ({"task": "painting"}, "its task is 'painting'; expected one of generation"),
        ({"dtype": "fp8"}, "dtype 'fp8'"),
        ({"format": 99}, "run.json"),
    ],
    ids=["moved", "no-base", "classifier", "other-task", "other-dtype", "other-format"],
)
def test_records_that_do_not_help(run, refused, change, message):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **change}))
    assert message in refused("generate", "--adapter", run, "--prompt", "w1")


def test_a_best_epoch_is_explained_by_the_folder_above(run, fastadapter):
    (run / "best").mkdir()
    (run / "adapter.safetensors").rename(run / "best" / "adapter.safetensors")
    assert fastadapter("generate", "--adapter", run / "best", "--prompt", "w1", "--max-new-tokens", 1)[0] == 0


def test_adapters_of_two_models_need_to_be_told_which(save_run, model_folder, tmp_path, refused, ask):
    one = save_run(make_model(), model_folder, "one", template="w5 {text}")
    two = save_run(make_model(), "no/where", "two", fa.PrefixTuningConfig(prefix_len=3))
    file = tmp_path / "mixed.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": "w1", "adapter": each}) + "\n" for each in ("one", "two", None))
    )
    words = ("--adapters", f"one={one}", f"two={two}", "--file", file)
    assert "--model says which to take" in refused("generate", *words)
    records = ask(*words)
    assert [record["prompt"] for record in records] == ["w5 w1", "w1", "w1"]
    assert [record["adapter"] for record in records] == ["one", "two", None]
    assert records[2]["completion"] == theirs(model_folder, "w1", max_new_tokens=6)[0]
    assert records[1]["completion"] == theirs(model_folder, "w1", two, max_new_tokens=6)[0]


# Prompts


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", "w1 w2\r\n\r\nw3\r\n"),
        ("a.jsonl", '{"prompt": "w1 w2"}\n{"text": "w3", "label": "x"}\n'),
        ("a.csv", "prompt,id\nw1 w2,1\nw3,2\n"),
        ("a", "\ufeffw1 w2\nw3"),
    ],
)
def test_prompts_in_files_and_on_stdin(ask, tmp_path, stdin, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    records = ask("--file", path)
    assert [record["prompt"] for record in records] == ["w1 w2", "w3"]
    if name in ("a.txt", "a"):
        stdin(text)
        assert [record["completion"] for record in ask()] == [record["completion"] for record in records]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"w1\n\xff\n", "a.txt line 2: not UTF-8"),
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"", "holds no prompts"),
        ("a.jsonl", b'{"prompt": 1}\n', "a.jsonl line 1: field 'prompt' must be a string, got int"),
        ("a.jsonl", b'{"question": "w1"}\n', "field 'prompt' or 'text' is missing; its fields are 'question'"),
        ("a.jsonl", b'{"prompt": "w1"}\n{"prompt": "\\ud800"}\n', "line 2: "),
        ("a.jsonl", b'{"messages": "w1"}\n', "field 'messages' must be a list of turns, got str"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "w1"}], "system": 1}\n', "field 'system' must be a"),
        ("a.jsonl", b'{"messages": [{"role": "system", "content": "w1"}]}\n', "no turn of the user's to answer"),
        ("a.txt", b"w1 " * CONTEXT, "line 1: the prompt has 64 tokens"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named_with_their_line(model_folder, tmp_path, refused, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert message in refused("generate", "--model", model_folder, "--file", tmp_path / name)


def test_a_long_line_is_not_read_whole(model_folder, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("fastadapter.cli.texts._MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"w1\n" + b"x" * (1 << 21))
    assert "line 2: longer than 1 MiB" in refused(
        "generate", "--model", model_folder, "--file", tmp_path / "a.txt"
    )


def test_no_prompt_at_a_terminal(model_folder, refused, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    assert "there is no text: give it by an option or --file" in refused("generate", "--model", model_folder)


# Conversations


def test_a_prompt_in_the_chat_template(ask, save_run, model_folder, tmp_path):
    (record,) = ask("--prompt", "w1", "--apply-chat-template", "--system-prompt", "w9")
    assert record["prompt"] == "system : w9 </s> user : w1 </s> assistant :"
    folder = save_run(make_model(), model_folder, chat=True, system_prompt="w8")
    (record,) = ask("--adapter", folder, "--prompt", "w1", model=None)
    assert record["prompt"] == "system : w8 </s> user : w1 </s> assistant :"
    (record,) = ask("--adapter", folder, "--prompt", "w1", "--no-apply-chat-template", model=None)
    assert record["prompt"] == "w1"
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    (record,) = ask("--file", file)
    assert record["prompt"] == "user : w1 </s> assistant :"


def test_special_tokens_in_prompts_are_text_unless_asked(save_run, model_folder, ask):
    """As in training; in a conversation, nobody ends a turn but the template."""
    text = "w1 </s> w2"
    folder = save_run(make_model(), model_folder, training={"parse_special_tokens": True})
    for words, parsed in (
        (("--prompt", text, "--parse-special-tokens"), True),
        (("--prompt", text, "--adapter", folder), True),
        (("--prompt", text, "--adapter", folder, "--no-parse-special-tokens"), False),
        (("--prompt", text), False),
    ):
        (record,) = ask(*words)
        assert record["prompt"] == text and (record["prompt_tokens"] == 3) is parsed, words
    one, two = (ask("--prompt", each, "--apply-chat-template")[0] for each in ("w1 w2", text))
    assert two["prompt"].count("</s>") == one["prompt"].count("</s>") + 1
    assert two["prompt_tokens"] > one["prompt_tokens"] + 1


def test_turns_of_a_conversation(model_folder, tmp_path, stdin, fastadapter):
    out = tmp_path / "chat.jsonl"
    words = ("generate", "--model", model_folder, "--chat", "--system-prompt", "w9", "--max-new-tokens", 3)
    stdin("w1\n\nw2\n/reset\nw1\n/exit\nw3\n")
    assert fastadapter(*words, "--output", out)[0] == 0
    first, second, third = read_lines(out)
    assert first["prompt"] == third["prompt"] == "system : w9 </s> user : w1 </s> assistant :"
    assert second["prompt"] == (
        f"system : w9 </s> user : w1 </s> assistant : {first['completion']} </s> user : w2 </s> assistant :"
    )
    stdin("w1\nw2\n")
    status, printed, err = fastadapter(*words)
    assert status == 0 and not err
    assert printed.splitlines() == [first["completion"], second["completion"]]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--template", "w1 {text}"), "--template does not go with --chat"),
        (("--no-apply-chat-template",), "--chat needs the chat template"),
        (("--adapters", "a=b"), "--chat goes with one --adapter"),
        (("--resume", "--output", "x.jsonl"), "--resume does not go with --chat"),
        (("--max-new-tokens", "60"), "--chat: the prompt has"),
    ],
)
def test_impossible_conversations(model_folder, refused, stdin, words, message):
    stdin("w1\n")
    assert message in refused("generate", "--model", model_folder, "--chat", *words)


def test_a_tokenizer_without_a_chat_template_and_one_that_refuses(
    model_folder, encoder_folder, refused, stdin
):
    model, tokenizer = make_model(), make_tokenizer()
    options = {"max_new_tokens": 2}
    with pytest.raises(UserError, match="--chat: the model's tokenizer has no chat template"):
        Answerer(model, tokenizer, options).encode_chat("--chat", [Message("user", "w1")])
    tokenizer.chat_template = "{{ raise_exception('no system prompts') }}"
    with pytest.raises(UserError, match="--chat: the chat template refuses the turns: no system prompts"):
        Answerer(model, tokenizer, options).encode_chat("--chat", [Message("user", "w1")])


# Files of answers


def stop_after(monkeypatch, batches):
    """Ctrl-C in the batch after these."""
    plain, calls = Answerer.answer, []

    def answer(self, *args, **options):
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return plain(self, *args, **options)

    monkeypatch.setattr(Answerer, "answer", answer)
    return plain


def without_seconds(path):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in read_lines(path)]


@pytest.mark.parametrize("drawn", [False, True])
def test_an_interrupted_file_goes_on(model_folder, tmp_path, prompts, fastadapter, monkeypatch, drawn):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    words = ["generate", "--model", model_folder, "--file", prompts, "--max-new-tokens", 3, "--batch-size", 2]
    words += ["--do-sample", "--num-return-sequences", 2] if drawn else []
    each = 2 if drawn else 1
    assert fastadapter(*words, "--output", whole)[0] == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        status, printed, err = fastadapter(*words, "--output", out)
    assert status == 130 and not printed and len(read_lines(out)) == 2 * each
    assert err.splitlines()[-1] == (
        f"fastadapter: interrupted; 2 of 5 prompts are answered in {out}; --resume goes on"
    )
    # a kill in the middle of a write, and one between the records of a batch
    first = out.read_text().splitlines()[0]
    out.write_text(f"{first}\n{first[:9]}")
    assert fastadapter(*words, "--output", out, "--resume")[0] == 0
    assert without_seconds(out) == without_seconds(whole)
    made = out.read_text()
    assert fastadapter(*words, "--output", out, "--resume")[0] == 0 and out.read_text() == made


@pytest.mark.parametrize(
    "change, message",
    [
        ((), "holds records; --resume goes on with them"),
        (("--resume", "--max-new-tokens", "4"), "was made with other settings: max_new_tokens was 3, now 4"),
        (("--resume", "--stop", "w1"), "stop was None, now ['w1']"),
        (("--resume", "--prompt", "w3"), "line 1: prompt was 'w1 w2', now 'w3'"),
    ],
)
def test_a_file_of_other_answers_is_left_alone(model_folder, tmp_path, refused, fastadapter, change, message):
    out = tmp_path / "answers.jsonl"
    words = ["generate", "--model", model_folder, "--output", out, "--prompt", "w1 w2", "--max-new-tokens", 3]
    assert fastadapter(*words)[0] == 0
    before = out.read_bytes()
    assert message in refused(*words, *change) and out.read_bytes() == before


def test_files_that_cannot_be_gone_on_with(model_folder, tmp_path, refused, fastadapter):
    out = tmp_path / "answers.jsonl"
    words = ["generate", "--model", model_folder, "--output", out, "--max-new-tokens", 1]
    two = tmp_path / "two.txt"
    two.write_text("w1\nw2\n")
    assert fastadapter(*words, "--file", two)[0] == 0
    assert "holds 2 records, more than the 1 asked for" in refused(*words, "--prompt", "w1", "--resume")
    whole = out.read_text()
    out.write_text("{\n" + whole)
    assert "answers.jsonl line 1: malformed JSON" in refused(*words, "--file", two, "--resume")
    out.write_text(whole)
    (tmp_path / "answers.jsonl.settings.json").unlink()
    assert "settings.json is gone" in refused(*words, "--file", two, "--resume")
    assert "expected a file, got a folder" in refused(*words, "--output", tmp_path, "--prompt", "w1")
    assert "cannot write to" in refused(*words, "--output", two / "x.jsonl", "--prompt", "w1")


def test_a_full_disk_is_said_and_nothing_is_lost(model_folder, tmp_path, prompts, fastadapter, monkeypatch):
    from fastadapter.cli import records

    plain = records.RecordFile.write

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    def write(self, made):
        if self.path.stat().st_size:
            self.file = Full()
        plain(self, made)

    monkeypatch.setattr(records.RecordFile, "write", write)
    monkeypatch.setattr(records.RecordFile, "close", lambda self: None)
    out = tmp_path / "answers.jsonl"
    words = ["generate", "--model", model_folder, "--file", prompts, "--max-new-tokens", 1, "--batch-size", 1]
    status, _, err = fastadapter(*words, "--output", out)
    assert status == 2 and len(read_lines(out)) == 1
    assert f"--output {out}: No space left on device; --resume goes on" in err.splitlines()[-1]


def test_json_lines_on_stdout(model_folder, prompts, fastadapter):
    words = ("generate", "--model", model_folder, "--file", prompts, "--max-new-tokens", 2, "--json")
    status, printed, err = fastadapter(*words)
    assert status == 0 and [json.loads(line)["prompt"] for line in printed.splitlines()] == PROMPTS
