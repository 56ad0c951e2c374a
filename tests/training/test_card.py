"""What ``finetune`` leaves beside the weights: ``run.json``, a model card, and an adapter that names its base."""

import ast
import json
import re

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fastadapter as fa
from fastadapter.checkpoints.describe import describe_file
from fastadapter.cli import main
from fastadapter.training.card import write_card
from fastadapter.training.run_record import read_run
from tests.training.toy import make_classifier, make_examples, make_model, make_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A finished generation run and a finished classification, by the command."""
    folder = tmp_path_factory.mktemp("work")
    make_model().save_pretrained(folder / "little-llama")
    make_classifier("bert").bert.save_pretrained(folder / "little-bert")
    for name in ("little-llama", "little-bert"):
        make_tokenizer().save_pretrained(folder / name)
    rows = [
        (e.prompt.removeprefix("Review: ").removesuffix("\nSentiment:"), e.label) for e in make_examples(20)
    ]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    assert finetune(folder, "little-llama", "generated") == 0
    assert finetune(folder, "little-bert", "classified", "--task", "classification") == 0
    return folder


def finetune(folder, model, out, *more):
    words = ["--model", str(folder / model), "--data", str(folder / "reviews.csv"), "--eval-count", "6"]
    return main(
        ["finetune", *words, "--output-dir", str(folder / out), "--device", "cpu", "--batch-size", "8"]
        + ["--prefix-len", "3", "--num-train-epochs", "1", *more]
    )


def test_the_command_is_in_the_record(work):
    record = read_run(work / "generated")
    assert (
        record["command"][:3] == ["fastadapter", "finetune", "--model"]
        and "--prefix-len" in record["command"]
    )
    assert record["base"]["name"] == str(work / "little-llama") and record["base"]["gguf_file"] is None
    assert record["data"]["files"] == ["reviews.csv"]
    assert (record["data"]["train_records"], record["data"]["eval_records"]) == (14, 6)
    assert "{text}" in record["template"] and record["completion_template"] == " {label}"
    assert record["labels"] is None and record["chat"] is False and record["finished"]
    record = read_run(work / "classified")
    assert record["task"] == "classification" and record["labels"] == ["bad", "good"]
    assert record["template"] == "{text}" and record["completion_template"] is None


def test_the_adapters_tell_the_same(work):
    found = describe_file(work / "classified" / "best")
    assert found["labels"] == ["bad", "good"] and found["task"] == "classification"
    assert found["base"]["name"] == "little-bert" and found["dtype"] == "fp32"
    assert found["template"] == "{text}"
    assert describe_file(work / "generated")["template"] == read_run(work / "generated")["template"]


@pytest.mark.parametrize("name", ["generated", "classified"])
def test_the_card_is_one_of_the_hub_and_its_code_loads_the_adapter(work, name):
    card = ModelCard.load(work / name / "README.md")
    task = read_run(work / name)["task"]
    assert card.data.library_name == "fastadapter" and task in card.data.tags and card.data.license is None
    assert card.data.base_model is None  # a folder of one's own has no name on the hub
    accuracy = read_run(work / name)["eval"]["accuracy_after"]
    assert f"{accuracy:.2%}" in card.text and "| before |" in card.text
    assert f"fastadapter {'generate' if name == 'generated' else 'classify'} --model little-" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    calls = [each for each in ast.walk(ast.parse(code)) if isinstance(each, ast.Call)]
    kind = AutoModelForCausalLM if name == "generated" else AutoModelForSequenceClassification
    assert kind.__name__ in code
    given = {each.arg: ast.literal_eval(each.value) for call in calls for each in call.keywords}
    base = next(call.args[0].value for call in calls if call.func.attr == "from_pretrained")
    fa.load(kind.from_pretrained(work / base, **given), work / name)


def test_a_card_names_a_base_of_the_hub(work, tmp_path):
    record = read_run(work / "generated")
    record["base"] |= {"name": "some/base", "revision": "abc", "gguf_file": "x.gguf"}
    record["adapter_config"]["init_text"] = "a | b\nc"
    assert write_card(tmp_path, record)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/base" and r"a \| b c" in card.text
    assert "from_pretrained('some/base', revision='abc', gguf_file='x.gguf')" in card.text


def test_a_page_that_somebody_wrote_or_changed_stays(work, tmp_path, capsys):
    record = read_run(work / "generated")
    path = tmp_path / "README.md"
    for text in ("mine\n", "", "\udc80"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert not write_card(tmp_path, record)
        assert path.read_bytes() == text.encode(errors="surrogateescape")
        assert "stays as it is" in capsys.readouterr().err
    path.unlink()
    assert write_card(tmp_path, record) and write_card(tmp_path, {**record, "method": "prefix-tuning"})
    text = path.read_text()
    assert text.startswith("---\n") and "# prefix-tuning for" in text
    path.write_text(text.replace("## Numbers", "## My numbers"))
    assert not write_card(tmp_path, record) and "## My numbers" in path.read_text()


def test_another_base_is_refused_by_the_commands_unless_one_insists(work, capsys):
    make_model(seed=4).save_pretrained(work / "other-llama")
    make_tokenizer().save_pretrained(work / "other-llama")
    words = ["--model", str(work / "other-llama"), "--adapter", str(work / "generated"), "--device", "cpu"]
    commands = (["generate", *words, "--prompt", "w1", "--max-new-tokens", "1"], ["explain", *words])
    for command in commands:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "was made on another base model (little-llama)" in error and "--any-base" in error
    for command in commands:
        with pytest.warns(UserWarning, match="another base model"):
            assert main([*command, "--any-base"]) == 0


def test_a_locked_folder_is_found_out_before_the_model_is_loaded(work, capsys, monkeypatch):
    from fastadapter.cli import finetune as module
    from fastadapter.training.lock import FolderLock

    lock = FolderLock(work / "generated")
    lock.acquire()
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert finetune(work, "little-llama", "generated", "--resume") == 2
    lock.release()
    error = capsys.readouterr().err
    assert "in use by another run" in error and json.dumps(error)
