"""fa.verify: an adapter's effect apart from its heads', random batches of every kind, heads that do not act."""

import pytest
import torch
import transformers as tf
from torch import nn

import fastadapter as fa
from tests.integrations.test_heads import HEADS, IMAGE, METHODS, SIZES, Around, bert, classifier, move
from tests.support.models import token_ids

CONFIG = METHODS["llama-adapter"]


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_passes(method, trained):
    """A copied head is no adapter: prefixes and soft prompts have no state without effect, whatever a head has."""
    model = classifier()
    fa.attach(model, METHODS[method])
    if trained:
        move(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [check.name for check in fa.verify(model)]
    assert ("without its effect it is the base model" in names) == (method not in ("prefix", "soft-prompt"))
    assert names[-1] == "its copies of the model's modules act"
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_head_does_not_stand_in_for_the_adapter(monkeypatch):
    """An adapter that does nothing fails, although its trained head changes the output."""
    from fastadapter.integrations.passes.prefix import PrefixHost

    model = classifier()
    fa.attach(model, METHODS["prefix"])
    move(model)
    monkeypatch.setattr(PrefixHost, "attend", lambda self, base, *_: base())
    with pytest.raises(fa.VerificationError, match="it changes the output: largest difference 0"):
        fa.verify(model)


def test_a_head_that_is_not_called_fails():
    """A model that reads a head's weights passes its copy by, which would train nothing."""

    class Reading(Around):
        def forward(self, input_ids):
            hidden = self.backbone(input_ids).last_hidden_state
            return nn.functional.linear(hidden, self.classifier.weight)

    model = Reading(classifier=nn.Linear(32, 2))
    fa.attach(model, CONFIG)
    with pytest.raises(fa.VerificationError, match="reads the weights of classifier without calling it"):
        fa.verify(model)


@pytest.mark.parametrize("kind", [kind for kind in HEADS if not kind.startswith("BertFor")])
def test_random_batches(kind):
    """Token ids, pixels, spectrograms and sound are made to fit the configuration."""
    config, _ = HEADS[kind]
    torch.manual_seed(0)
    model = getattr(tf, kind)(config).eval()
    fa.attach(model, fa.PrefixTuningConfig(prefix_len=2, init_std=1.0))
    fa.verify(model)


def test_choices_and_labels():
    model = classifier("BertForMultipleChoice")
    fa.attach(model, CONFIG)
    fa.verify(model)
    config, _ = HEADS["Wav2Vec2ForXVector"]
    model = tf.Wav2Vec2ForXVector(config).eval()
    fa.attach(model, CONFIG)
    [*_, check] = fa.verify(model)
    assert "this batch does not reach objective" in check.detail
    [*_, check] = fa.verify(model, {"input_values": torch.randn(2, 2000), "labels": torch.tensor([0, 1])})
    assert "does not reach" not in check.detail


def test_what_no_batch_can_be_made_for_is_asked_for():
    class Pairs(Around):
        def forward(self, first, second):
            return super().forward(first) - super().forward(second)

    model = Pairs(classifier=nn.Linear(32, 2))
    fa.attach(model, CONFIG)
    with pytest.raises(
        ValueError, match="batch: Pairs takes first, second, and none of input_ids, pixel_values"
    ):
        fa.verify(model)
    fa.verify(model, {"first": token_ids(), "second": token_ids(seed=1)})

    class More(Around):
        def forward(self, input_ids, weights):
            return super().forward(input_ids) * weights

    model = More(classifier=nn.Linear(32, 2))
    fa.attach(model, CONFIG)
    with pytest.raises(ValueError, match="batch: More also needs weights"):
        fa.verify(model)
    plain = Around(bert(), classifier=nn.Linear(32, 2))
    fa.attach(plain, CONFIG)
    fa.verify(plain)

    class HandingOn(Around):
        def forward(self, *args, **kwargs):
            return self.classifier(self.backbone(*args, **kwargs).last_hidden_state)

    model = HandingOn(classifier=nn.Linear(32, 2))
    fa.attach(model, CONFIG)
    fa.verify(model)

    class Picky(Around):
        def forward(self, input_ids):
            raise ValueError("no such text")

    model = Picky(classifier=nn.Linear(32, 2))
    fa.attach(model, CONFIG)
    with pytest.raises(
        ValueError, match=r"batch: Picky does not take a random one of input_ids \(no such text\)"
    ):
        fa.verify(model)


def test_pixels_reach_the_generation_check():
    """A model of images and text: the full forward sees the same pixels as the cached one."""
    torch.manual_seed(0)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**{**IMAGE, "vocab_size": 64}, projection_dim=32),
        text_config=tf.LlamaConfig(**SIZES, pad_token_id=0),
        image_token_index=63,
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    fa.attach(model, CONFIG)
    ids = torch.cat([torch.full((2, 16), 63), token_ids(2, 5)], dim=1)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    assert any(check.name == "cached generation is the full forward" for check in fa.verify(model, batch))
