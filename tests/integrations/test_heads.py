"""Which modules of a model are heads, judged by name; and that their copies train, save, load, fold and mix."""

import pytest
import torch
import transformers as tf
from torch import nn

import fastadapter as fa
from fastadapter.integrations.parts.heads import find_heads

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
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
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

    config = tf.BertConfig(**SIZES)
    assert list(find_heads(Reward(config)).modules) == ["score"]
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
