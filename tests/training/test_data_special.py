"""Special tokens that somebody wrote: text, in every tokenizer at hand, unless they are asked to be tokens."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from fastadapter.cli import assets
from fastadapter.training import Example, TrainingConfig, UserError, classify, encode_examples, predict_labels
from fastadapter.training.classification import ClassificationTask
from fastadapter.training.data import encode_prompt, special_tokens, tokenize
from fastadapter.training.tasks import GenerationTask
from tests.training.toy import WORDS, make_adapted, make_classifier, make_model, make_tokenizer

EOS = WORDS.index("</s>")


def real(name):
    folder = next((assets.cache_dir() / "models").glob(name), None)
    if folder is None:
        pytest.skip(f"{name} is not at hand")
    return AutoTokenizer.from_pretrained(folder)


TOKENIZERS = {
    "toy": make_tokenizer,
    "bytes, in Python": ByT5Tokenizer,
    "smollm2": lambda: real("SmolLM2-*"),
    "minilm": lambda: real("all-MiniLM-*"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_in_text_are_text(kind):
    tokenizer = TOKENIZERS[kind]()
    special = {
        word: index for word, index in special_tokens(tokenizer).items() if index != tokenizer.unk_token_id
    }
    assert special
    for word, index in special.items():
        text = f"w1 {word} w2"
        assert index not in tokenize(tokenizer, [text], ["a"], add_special_tokens=False)[0]
        assert (
            index
            in tokenize(tokenizer, [text], ["a"], parse_special_tokens=True, add_special_tokens=False)[0]
        )
    # Text without any is what it was, and the tokenizer is left as it was found.
    plain = "w1 w2 good"
    assert tokenize(tokenizer, [plain, text], ["a", "b"])[0] == tokenizer(plain)["input_ids"]
    assert index in tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompts_and_completions_keep_their_text():
    tokenizer = make_tokenizer()
    example = Example("w1 </s> w2", " good </s>")
    kept = encode_examples(tokenizer, [example], append_eos=True)[0]
    assert [at for at, token in enumerate(kept.input_ids) if token == EOS] == [len(kept.input_ids) - 1]
    parsed = encode_examples(tokenizer, [example], parse_special_tokens=True)[0]
    assert parsed.input_ids.count(EOS) == 2 and parsed.prompt_len == 3
    assert EOS not in encode_prompt(tokenizer, "w1 </s>")
    # An end that was asked for is no end that the tokenizer puts behind every text.
    assert encode_prompt(tokenizer, "w1 </s>", parse_special_tokens=True)[-1] == EOS
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    assert encode_prompt(tokenizer, "w1 w2", parse_special_tokens=True) == [1, 2]


def test_the_configuration_decides_for_every_task():
    example = Example("w1 </s> w2", " good", "good", "a")
    other = Example("w3", " bad", "bad", "b")
    for parse in (False, True):
        config = TrainingConfig(parse_special_tokens=parse)
        written = GenerationTask(make_adapted(), make_tokenizer(), [example, other], None, config)
        classes = ClassificationTask(make_classifier(), make_tokenizer(), [example, other], None, config)
        assert [EOS in task.train[0].input_ids for task in (written, classes)] == [parse, parse]
    labels = {"good": " good", "bad": " bad"}
    assert predict_labels(make_model(), make_tokenizer(), [example], labels, parse_special_tokens=True)
    assert classify(
        make_classifier(), make_tokenizer(), [example.prompt], ["bad", "good"], parse_special_tokens=True
    )


def test_where_it_cannot_be_text_it_is_refused():
    """Words between spaces are looked up whole, so the end token is a word of the vocabulary like any other."""
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    example = Example("w1 </s> w2", " good", None, "a.csv line 3")
    with pytest.raises(
        UserError, match=r"^a\.csv line 3: holds '</s>', of which this tokenizer makes its special token"
    ):
        encode_examples(tokenizer, [example])
    assert encode_examples(tokenizer, [example], parse_special_tokens=True)


def test_a_tokenizer_that_knows_no_such_option_is_left_alone():
    class Plain:
        """As mistral-common's: text is text, and asking for it is an error."""

        unk_token_id, all_special_tokens = None, ("</s>",)

        def convert_tokens_to_ids(self, token):
            return 2

        def __call__(self, texts, split_special_tokens=False, **options):
            if split_special_tokens:
                raise ValueError("`split_special_tokens` is not supported")
            many = isinstance(texts, list)
            ids = [[ord(letter) for letter in text] for text in (texts if many else [texts])]
            return {"input_ids": ids if many else ids[0]}

    assert tokenize(Plain(), ["</s>"], ["a"]) == [[ord(letter) for letter in "</s>"]]


def test_the_end_of_a_completion_may_be_cut():
    tokenizer = make_tokenizer()
    example = Example("w1 w2 w3", " good bad fine", source="a.jsonl line 2")
    cut = encode_examples(tokenizer, [example], max_length=4, truncation="end", append_eos=True)[0]
    assert ([WORDS[token] for token in cut.input_ids], cut.prompt_len) == (["w1", "w2", "w3", "good"], 3)
    with pytest.raises(UserError, match=r"a\.jsonl line 2: .* at most 3 fit; its prompt alone fills that"):
        encode_examples(tokenizer, [example], max_length=3, truncation="end")
    with pytest.raises(UserError, match="truncation must be one of error, prompt, end, got 'start'"):
        TrainingConfig(truncation="start")
