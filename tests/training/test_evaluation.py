"""Label prediction and held-out scores, judged by one forward pass per row and candidate."""

import pytest
import torch

from fastadapter.training import Example, UserError, encode_examples, label_completions, predict_labels
from fastadapter.training.evaluation import prepare, score_candidates
from fastadapter.training.held_out import measure
from tests.training.toy import make_examples, make_model, make_tokenizer

ONE_TOKEN = {"bad": " bad", "fine": " fine", "good": " good"}
MANY_TOKENS = {"bad": " very bad", "fine": " w5 fine", "good": " w9 good w3"}


@torch.no_grad()
def likelihood(model, tokenizer, prompt, completion, eos=False):
    encoded = encode_examples(tokenizer, [Example(prompt, completion)], append_eos=eos)[0]
    logp = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    return sum(
        logp[i - 1, encoded.input_ids[i]].item() for i in range(encoded.prompt_len, len(encoded.input_ids))
    )


@pytest.mark.parametrize("labels", [ONE_TOKEN, MANY_TOKENS], ids=["one-token", "many-tokens"])
@pytest.mark.parametrize("eos", [False, True], ids=["open", "eos"])
def test_the_likeliest_label_is_predicted(labels, eos):
    model, tokenizer, examples = make_model(), make_tokenizer(), make_examples(23)
    done = []
    predicted = predict_labels(
        model, tokenizer, examples, labels, batch_size=5, append_eos=eos, tick=done.append
    )
    scores = [
        {k: likelihood(model, tokenizer, e.prompt, c, eos) for k, c in labels.items()} for e in examples
    ]
    assert predicted == [max(row, key=row.get) for row in scores]
    assert len(set(predicted)) > 1
    assert done == sorted(done) and done[-1] == 1.0


def test_one_token_labels_take_one_forward_pass():
    model, tokenizer, examples = make_model(), make_tokenizer(), make_examples(8)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    predict_labels(model, tokenizer, examples, ONE_TOKEN, batch_size=8)
    assert len(calls) == 1
    predict_labels(model, tokenizer, examples, MANY_TOKENS, batch_size=8)
    assert len(calls) == 4


def test_scores_do_not_depend_on_the_way_they_are_computed():
    model, tokenizer, examples = make_model(), make_tokenizer(), make_examples(9)
    candidates = prepare(tokenizer, examples, {"bad": " bad", "good": " good"}).candidates
    together, _ = score_candidates(model, candidates, 4)
    apart = torch.cat([score_candidates(model, [[row[i]] for row in candidates], 4)[0] for i in range(2)], 1)
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)


def test_held_out_loss_and_accuracy():
    model, tokenizer, examples = make_model(), make_tokenizer(), make_examples(12)
    labels = label_completions(examples)
    data = prepare(tokenizer, examples, labels)
    found = measure(data, model, 5)
    predicted = predict_labels(model, tokenizer, examples, labels)
    right = [guess == example.label for guess, example in zip(predicted, examples)]
    assert data.rows == 12 and found["accuracy"] == sum(right) / 12
    assert found["loss"] == pytest.approx(
        -sum(likelihood(model, tokenizer, e.prompt, e.completion) for e in examples) / 12, 1e-5
    )
    table = torch.zeros(12, 2, dtype=torch.float64)
    for half in (range(0, 12, 2), range(1, 12, 2)):  # as two processes share them
        table[list(half)] = data.predict(model, half, 5, None)
    assert data.measure(table)["loss"] == pytest.approx(found["loss"], 1e-6)
    assert sum(map(sum, found["confusion_matrix"])) == 12 and set(found["per_class"]) == {"bad", "good"}


def test_a_free_completion_is_correct_when_greedy_decoding_gives_it():
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [e.prompt for e in make_examples(4)]
    examples = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        examples.append(Example(prompt, " " + tokenizer.decode(new)))
    right = prepare(tokenizer, examples, {})
    assert measure(right, model, 2)["accuracy"] == 1
    wrong = prepare(tokenizer, [Example(e.prompt, e.completion + " w7") for e in examples], {})
    ends = [int(row[0].input_ids[-1]) for row in wrong.candidates]
    assert measure(wrong, model, 2)["accuracy"] < 1 and len(set(ends)) == 1


def test_training_mode_is_restored():
    model = make_model().train()
    predict_labels(model, make_tokenizer(), make_examples(2), ONE_TOKEN)
    assert model.training


def test_labels_that_cannot_be_compared_are_refused():
    model, tokenizer, examples = make_model(), make_tokenizer(), make_examples(2)
    nested = {"good": " good", "better": " good good"}
    with pytest.raises(UserError, match="toy line 1: the tokens of 'good' begin those of 'better'"):
        predict_labels(model, tokenizer, examples, nested)
    assert predict_labels(model, tokenizer, examples, nested, append_eos=True)
    with pytest.raises(UserError, match="at least one label"):
        predict_labels(model, tokenizer, examples, {})
    with pytest.raises(UserError, match=r"toy line 1: label '(bad|good)' is not among"):
        prepare(tokenizer, examples, {"other": " fine"})
    assert predict_labels(model, tokenizer, [], ONE_TOKEN) == []
