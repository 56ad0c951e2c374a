"""Which modules of a model are heads, judged by name; and that their copies train, save, load, fold and mix."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import fastadapter as fa
from fastadapter.integrations.parts.heads import find_heads
from fastadapter.nn import ModuleCopy
from tests.support.budget import same_bits
from tests.support.models import token_ids

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
AUDIO = {**SIZES, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
         "tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}  # fmt: skip
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
      "decoder_start_token_id": 0}  # fmt: skip
WHISPER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
           "max_source_positions": 20, "vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 1,
           "classifier_proj_size": 16}  # fmt: skip
HEADS = {
    "BertForSequenceClassification": (tf.BertConfig(**SIZES), "classifier"),
    "BertForTokenClassification": (tf.BertConfig(**SIZES), "classifier"),
    "BertForQuestionAnswering": (tf.BertConfig(**SIZES), "qa_outputs"),
    "BertForMultipleChoice": (tf.BertConfig(**SIZES), "classifier"),
    "BertForNextSentencePrediction": (tf.BertConfig(**SIZES), "cls"),
    "LlamaForQuestionAnswering": (tf.LlamaConfig(**SIZES), "qa_outputs"),
    "LlamaForSequenceClassification": (tf.LlamaConfig(**SIZES), "score"),
    "T5ForQuestionAnswering": (tf.T5Config(**T5), "qa_outputs"),
    "ViTForImageClassification": (tf.ViTConfig(**IMAGE), "classifier"),
    "WhisperForAudioClassification": (tf.WhisperConfig(**WHISPER), "projector classifier"),
    "Wav2Vec2ForCTC": (tf.Wav2Vec2Config(**AUDIO), "lm_head"),
    "Wav2Vec2ForXVector": (
        tf.Wav2Vec2Config(**AUDIO),
        "projector tdnn.0 tdnn.1 feature_extractor classifier objective",
    ),
    # pretrained with the rest, tied to the embeddings or not
    "BertModel": (tf.BertConfig(**SIZES), ""),
    "BertForMaskedLM": (tf.BertConfig(**SIZES), ""),
    "BertForPreTraining": (tf.BertConfig(**SIZES), ""),
    "LlamaForCausalLM": (tf.LlamaConfig(**SIZES), ""),
    "T5ForConditionalGeneration": (tf.T5Config(**T5), ""),
    "WhisperForConditionalGeneration": (tf.WhisperConfig(**WHISPER), ""),
}


def bert(**options):
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig(**SIZES, **options))


def classifier(kind="BertForSequenceClassification", **options):
    torch.manual_seed(0)
    return getattr(tf, kind)(tf.BertConfig(**SIZES, **options)).eval()


def move(model, scale=0.3):
    """Give everything that is trainable other values, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in fa.trainable_parameters(model):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


class Around(nn.Module):
    """A user's own module around a backbone, which has no classes of transformers around it."""

    def __init__(self, backbone=None, **heads):
        super().__init__()
        self.backbone = bert() if backbone is None else backbone
        for name, head in heads.items():
            setattr(self, name, head)

    def forward(self, input_ids):
        hidden = self.backbone(input_ids).last_hidden_state
        return self.classifier(hidden)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_a_task(kind):
    """What is new to the task alone; the same names in a pretrained task are none."""
    config, names = HEADS[kind]
    found = find_heads(getattr(tf, kind)(config))
    assert list(found.modules) == names.split() and not found.bare


def test_a_value_head_beside_a_language_model():
    """A language model's own head stays frozen behind a wrapper too; the value head beside it is new."""

    class WithValueHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
            self.v_head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 1))

    model = WithValueHead()
    assert list(find_heads(model).modules) == ["v_head"]
    model.pretrained_model.score = nn.Linear(32, 1)  # put on a model of transformers by hand
    assert set(find_heads(model).modules) == {"v_head", "pretrained_model.score"}


def test_a_users_classes():
    """Derived from transformers', without a base_model_prefix that fits, with heads in lists, around a whole model."""

    class Reward(tf.PreTrainedModel):
        config_class = tf.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.trunk = tf.BertModel(config)
            self.score = nn.Linear(32, 1)

    class Derived(tf.BertForMaskedLM):
        def __init__(self, config):
            super().__init__(config)
            self.sentiment = nn.Linear(32, 2)

    class LanguageModel(tf.PreTrainedModel):
        config_class = tf.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.trunk, self.words = tf.BertModel(config), nn.Linear(32, 64)

        def get_output_embeddings(self):
            return self.words

    config = tf.BertConfig(**SIZES)
    assert list(find_heads(Reward(config)).modules) == ["score"]
    assert list(find_heads(LanguageModel(config)).modules) == []
    assert list(find_heads(Derived(config)).modules) == ["sentiment"]
    lists = Around(classifiers=nn.ModuleList([nn.Linear(32, 2), nn.Sequential(nn.Linear(32, 2))]))
    assert list(find_heads(lists).modules) == ["classifiers.0", "classifiers.1"]
    assert list(find_heads(Around(classifier(), extra=nn.Linear(2, 2))).modules) == [
        "backbone.classifier",
        "extra",
    ]
    assert list(find_heads(nn.Sequential(bert(), nn.Linear(32, 2))).modules) == ["1"]


def test_a_users_own_blocks_are_no_heads():
    """A backbone that a user puts together of blocks is one itself: its embeddings and norms stay frozen."""
    layers = bert().encoder.layer

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings, self.layers, self.norm = nn.Embedding(64, 32), layers, nn.LayerNorm(32)

    assert not find_heads(Own()).modules
    assert list(find_heads(Around(Own(), classifier=nn.Linear(32, 2))).modules) == []


def test_a_head_that_was_missing(tmp_path):
    """from_pretrained drew what the files lack of a pretrained task's head; a language model's may be resized."""
    config = tf.DPTConfig(**IMAGE, backbone_out_indices=[0, 1, 0, 1], neck_hidden_sizes=[8, 8, 8, 8],
                          fusion_hidden_size=8, is_hybrid=False, head_in_index=-1)  # fmt: skip
    tf.DPTModel(config).save_pretrained(tmp_path / "headless")
    tf.DPTForDepthEstimation(config).save_pretrained(tmp_path / "whole")
    headless = tf.DPTForDepthEstimation.from_pretrained(tmp_path / "headless")
    assert list(find_heads(headless).modules) == ["neck", "head"]
    assert not find_heads(tf.DPTForDepthEstimation.from_pretrained(tmp_path / "whole")).modules
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "lm")
    resized = tf.LlamaForCausalLM.from_pretrained(tmp_path / "lm")
    resized.resize_token_embeddings(70)
    assert not find_heads(resized).modules


def test_bare_parameters_are_named():
    """A parameter beside the backbone cannot be copied; nobody must believe that it trains."""
    config = tf.Wav2Vec2Config(**AUDIO, use_weighted_layer_sum=True)
    model = tf.Wav2Vec2ForSequenceClassification(config)
    with pytest.warns(UserWarning, match="layer_weights: parameters beside the backbone"):
        fa.attach(model, fa.LlamaAdapterConfig(prefix_len=2))
    model = Around(classifier=nn.Linear(32, 2), pooling=nn.Parameter(torch.zeros(32)))
    with pytest.warns(UserWarning, match=r"^pooling: parameters"):
        fa.attach(model, fa.LlamaAdapterConfig(prefix_len=2))
    with (
        pytest.warns(UserWarning, match="pooling"),
        pytest.raises(ValueError, match="modules_to_save: pooling is a parameter"),
    ):
        fa.attach(model, fa.LlamaAdapterConfig(prefix_len=2, modules_to_save=("pooling",)), "named")


METHODS = {
    "llama-adapter": fa.LlamaAdapterConfig(prefix_len=2),
    "v2": fa.LlamaAdapterV2Config(prefix_len=2),
    "prefix": fa.PrefixTuningConfig(prefix_len=2),
    "soft-prompt": fa.SoftPromptConfig(prompt_len=2),
    "bottleneck": fa.BottleneckConfig(bottleneck_size=4),
}


@pytest.mark.parametrize("method", METHODS)
def test_heads_train_save_and_load(method, tmp_path):
    """Under every method the copy gets the gradient, the model's own head none; a fresh model loads both."""
    model, ids = classifier("BertForQuestionAnswering"), token_ids()
    fa.attach(model, METHODS[method])
    own = model.qa_outputs.weight.detach().clone()
    move(model)
    model(ids).start_logits.sum().backward()
    assert model.qa_outputs.fa_copy.adapters["default"].own.weight.grad.abs().sum() > 0
    assert not model.qa_outputs.weight.requires_grad and model.qa_outputs.weight.grad is None
    assert same_bits(model.qa_outputs.weight.detach(), own)
    fa.save(model, tmp_path)
    other = classifier("BertForQuestionAnswering")
    with torch.no_grad():
        other.qa_outputs.weight.normal_()
    fa.load(other, tmp_path)
    assert same_bits(other(ids).start_logits, model(ids).start_logits)


def test_modules_to_save(tmp_path):
    """What the user names trains, is saved with the configuration, restored, and shown."""
    config = fa.LlamaAdapterConfig(prefix_len=2, layers=1, modules_to_save=["pooler", "layer.0.output.dense"])
    model, ids = bert().eval(), token_ids()
    fa.attach(model, config)
    move(model)
    trained = {key.partition(".fa_copy")[0] for key, _ in fa.trainable_parameters(model) if ".fa_copy" in key}
    assert trained == {"pooler", "encoder.layer.0.output.dense"}
    shown = {row["module"] for row in fa.explain(model).rows}
    assert trained <= shown
    fa.save(model, tmp_path)
    other = bert().eval()
    fa.load(other, tmp_path)
    assert same_bits(other(ids).pooler_output, model(ids).pooler_output)
    fa.verify(model)
    fa.detach(other)
    assert same_bits(other(ids).pooler_output, bert().eval()(ids).pooler_output)


def test_modules_to_save_with_heads_and_norms():
    """Named again what is a head, in one, or a norm that the method trains: once is enough."""
    names = ("classifier", "LayerNorm", "projector")
    model = tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**AUDIO)).eval()
    with pytest.raises(ValueError, match="no module called 'LayerNorm'"):
        fa.attach(model, fa.LlamaAdapterV2Config(prefix_len=2, modules_to_save=names))
    model = classifier()
    fa.attach(model, fa.LlamaAdapterV2Config(prefix_len=2, modules_to_save=names[:2]))
    fa.verify(model)
    assert len({key for key, _ in model.named_parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"modules_to_save": ("nothing",)},
            r"no module called 'nothing' with parameters; there is .*lm_head",
        ),
        (
            {"modules_to_save": ("model",)},
            r"model is adapted by the method itself in model\.layers\.0\.self_attn",
        ),
        ({"modules_to_save": ("embed_tokens",)}, r"embed_tokens\.weight is also lm_head\.weight.*name both"),
    ],
)
def test_what_cannot_be_saved_is_refused(config, message):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fa.attach(model, fa.LlamaAdapterConfig(prefix_len=2, **config))
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("value", ["lm_head", [1], 3])
def test_modules_to_save_must_be_names(value):
    for kind in METHODS.values():
        with pytest.raises(TypeError, match="modules_to_save must be a sequence of names"):
            type(kind)(modules_to_save=value)
        with pytest.raises(ValueError, match="modules_to_save must name at least one"):
            type(kind)(modules_to_save=())


def test_tied_modules_stay_tied():
    """Embeddings and a language model's head, both named, share one copy that trains; nothing of the base moves."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    fa.attach(model, fa.LlamaAdapterConfig(prefix_len=2, modules_to_save=("embed_tokens", "lm_head")))
    copies = [
        module.fa_copy.adapters["default"].own.weight for module in (model.lm_head, model.model.embed_tokens)
    ]
    assert copies[0] is copies[1]
    model.to(torch.float64)
    assert copies[0] is model.lm_head.fa_copy.adapters["default"].own.weight
    fa.verify(model.float())


def test_what_a_head_shares_with_the_backbone_is_the_backbones():
    """A user's masked-language head, tied to the embeddings: its own part trains, the embeddings stay frozen."""
    from transformers.models.bert.modeling_bert import BertOnlyMLMHead

    backbone, ids = bert().eval(), token_ids()
    head = BertOnlyMLMHead(backbone.config)
    head.predictions.decoder.weight = backbone.embeddings.word_embeddings.weight
    model = Around(backbone, classifier=head).eval()
    base = model(ids)
    fa.attach(model, fa.LlamaAdapterConfig(prefix_len=2))
    assert same_bits(model(ids), base)
    assert not any("decoder.weight" in key for key, _ in fa.trainable_parameters(model))
    move(model)
    moved = model(ids)
    with torch.no_grad():
        backbone.embeddings.word_embeddings.weight[:, 0] += 1
    assert not same_bits(model(ids), moved)
    twice = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(32, 64))
    twice[0].weight = twice[2].weight = backbone.embeddings.word_embeddings.weight
    own = ModuleCopy(twice, shared=["0.weight"])
    assert {key for key, _ in own.own.named_parameters()} == {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert not backbone.embeddings.word_embeddings.weight.requires_grad
    whole = Around(classifier=nn.Linear(32, 64, bias=False))
    whole.classifier.weight = whole.backbone.embeddings.word_embeddings.weight
    assert not find_heads(whole).modules


class Keywords(nn.Module):
    """A head with keywords, a second input and outputs of several kinds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 2)

    def forward(self, *, states, weights, scale):
        logits = self.linear(states) * scale
        return {"logits": logits, "pooled": ((logits * weights[..., None]).sum(1),), "note": "text"}


class WithKeywords(Around):
    def forward(self, input_ids):
        hidden = self.backbone(input_ids).last_hidden_state
        found = self.classifier(states=hidden, weights=torch.ones(input_ids.shape), scale=2.0)
        return found["logits"], found["pooled"][0], found["note"]


@torch.no_grad()
def test_rows_mix_heads_with_keywords_and_several_outputs():
    model, ids = WithKeywords(classifier=Keywords()).eval(), token_ids(3)
    alone = {None: model(ids)}
    for name in ("a", "b"):
        fa.attach(model, METHODS["llama-adapter"], name)
        move(model, 0.2)  # the second time both
    for name in ("a", "b"):
        fa.set_active(model, name)
        alone[name] = model(ids)
    names = ["b", None, "a"]
    with fa.rows(model, names):
        mixed = model(ids)
    for row, name in enumerate(names):
        for mine, expected in zip(mixed[:2], alone[name][:2], strict=True):
            torch.testing.assert_close(mine[row], expected[row])
    assert not torch.equal(alone["a"][0], alone["b"][0]) and mixed[2] == "text"


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(32, 4), nn.BatchNorm1d(4)

    def forward(self, states):
        return self.norm(self.linear(states[:, 0]))


def test_running_statistics_belong_to_the_adapter(tmp_path):
    """Batch norm in a head: saved and loaded with the adapter, apart for each, in half precision too."""

    def made(dtype):
        torch.manual_seed(0)
        return Around(bert(), classifier=Normed()).to(dtype)

    for dtype in (torch.float32, torch.bfloat16):
        model, ids = made(dtype), token_ids(8)
        fa.attach(model, METHODS["llama-adapter"])
        move(model)
        model.train()
        model.backbone.eval()
        for _ in range(3):
            model(ids)
        statistics = model.classifier.fa_copy.adapters["default"].own.norm.running_mean
        assert statistics.abs().sum() > 0
        fa.save(model, tmp_path / str(dtype))
        other = made(dtype)
        fa.load(other, tmp_path / str(dtype))
        assert same_bits(other.eval()(ids), model.eval()(ids))
        fa.verify(model, {"input_ids": ids})


def test_folding_heads_of_other_tasks():
    """V2's scales, norms and a span head in the weights, and back, bit for bit."""
    model, ids = classifier("BertForQuestionAnswering"), token_ids()
    base = model(ids).start_logits
    fa.attach(model, METHODS["v2"])
    move(model, 0.1)
    trained = model(ids).start_logits
    fa.fold(model)
    torch.testing.assert_close(model(ids).start_logits, trained, rtol=1e-4, atol=1e-5)
    fa.verify(model)
    fa.detach(model)
    assert same_bits(model(ids).start_logits, base)


def test_a_prefix_beside_a_head_folds():
    """The network behind the prefix goes; the copied head has none and stays."""
    model, ids = classifier(), token_ids()
    fa.attach(model, fa.PrefixTuningConfig(prefix_len=2, reparam_size=8))
    move(model)
    before = model(ids).logits
    fa.fold(model)
    assert same_bits(model(ids).logits, before)


def test_statistics_are_not_folded():
    model = Around(classifier=Normed()).eval()
    fa.attach(model, METHODS["v2"])
    with pytest.raises(ValueError, match=r"classifier keeps norm\.running_mean, .* cannot be folded"):
        fa.fold(model)


def test_a_copied_model_has_its_own_heads():
    model, ids = classifier(), token_ids()
    fa.attach(model, METHODS["llama-adapter"])
    other = copy.deepcopy(model)
    before = model(ids).logits
    move(other)
    assert same_bits(model(ids).logits, before) and not same_bits(other(ids).logits, before)
