"""A small random model of any family that transformers' auto classes know, by shrinking its configuration's fields."""

import inspect
import itertools
import re

import torch
import transformers as tf
from transformers.models.auto import modeling_auto

# The auto classes to take a family's model from, the first that knows it.
_AUTO = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_MAPPING_NAMES")
# Names of fields, and the value that all of them get; the first that matches.
_SMALL = [
    (r"num_kv_shared_layers", 2),
    (r".*(experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_?k_experts|num_selected_experts)", 2),
    (r"(num|n)_(local_|routed_|shared_)?experts|moe_num_experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*(kv|key_value)_heads|num_kv_heads|n_kv_heads|multi_query_group_num", 2),
    (r"(.*_)?(attention_heads|heads|n_head|n_heads)", 4),
    (r"(.*_)?(hidden_layers|num_layers|n_layers?|layers|encoder_layers|decoder_layers|depth)", 2),
    (r"(global_|swa_)?head_dim|d_kv|attention_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|kv_channels", 8),
    (r"qk_head_dim", 16),
    (r"(kv|q)_lora_rank|.*lora_rank", 8),
    (r"rotary_dim", 4),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|model_dim|dim|projection_dim|num_features|d_embed)", 32),
    (r"embedding_size|input_embedding_size", 32),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|d_inner|intermediate_size_mlp|ffn_size)", 48),
    (r"(.*_)?vocab_size.*", 64),
    (r"hidden_size_per_layer_input", 8),
    (r"(.*_)?(max_position_embeddings|n_positions|max_positions|n_ctx|max_seq_len|max_sequence_length)", 128),
    (r"max_source_positions|max_target_positions", 64),
    (r"image_size|img_size", 32),
    (r"patch_size", 4),
    (r"window_size", 2),
    (r"num_mel_bins", 8),
    (r"attention_chunk_size|sliding_window|chunk_size", 16),
    (r"codebook_size|num_codebooks|num_labels", 4),
    (r"mamba_d_state|ssm_state_size|mamba_d_conv|state_size", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim|linear_(key|value)_head_dim", 8),
    (r"linear_num_(key|value)_heads", 2),
]  # fmt: skip
_SMALL = [(re.compile(pattern), value) for pattern, value in _SMALL]
# What every entry of a list gets.
_LISTS = {"depths": 2, "num_heads": 2, "num_attention_heads": 2}
_TOKENS = re.compile(r"(.*_)?token_(id|index)|(.*_)?(bos|eos|pad|sep|cls|mask)_(token_)?id")
# Changes to the sizes above that some families need, tried in this order.
VARIANTS = (
    {},
    {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    {"hidden_size": 64, "head_dim": 16},
    {"head_dim": None},
    {"mrope_section": True},
    {"num_hidden_layers": 4},
)


def small_config(config_class, changes):
    """A configuration with small sizes; ``changes`` of its fields say otherwise, ``None`` leaves one at its default."""
    default = config_class()
    given = {}
    # to_dict leaves out what the constructor calls by another name
    for name, value in {**default.to_dict(), **_own_fields(config_class, default)}.items():
        field = config_class.attribute_map.get(name, name)
        if isinstance(getattr(config_class, field, None), property):  # computed from others
            continue
        sub = default.__dict__.get(name)
        if isinstance(sub, tf.PretrainedConfig):
            given[name] = small_config(type(sub), changes)
        elif name in changes:
            if changes[name] is not None:
                given[name] = changes[name]
        elif name == "layer_types" and isinstance(value, list) and value:
            kinds = list(dict.fromkeys(value))
            given[name] = (kinds * 4)[: max(4, len(kinds))]
        elif name in _LISTS and isinstance(value, list | tuple) and value:
            given[name] = [_LISTS[name]] * len(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            if _TOKENS.fullmatch(name):
                given[name] = min(value, 2) if "pad" not in name else 0
            else:
                small = next((small for pattern, small in _SMALL if pattern.fullmatch(name)), None)
                if small is not None:
                    given[name] = small
    rotary = given.get("rope_parameters", getattr(default, "rope_parameters", None))
    if isinstance(rotary, dict) and ("mrope_section" in rotary or "mrope_section" in changes):
        given["rope_parameters"] = {**rotary, "mrope_section": [2, 1, 1]}
    if "layer_types" in given and "num_hidden_layers" in given:
        given["num_hidden_layers"] = len(given["layer_types"])
    return config_class(**given)


def _own_fields(config_class, default):
    """What the constructor takes, by the names that it has there."""
    names = set(inspect.signature(config_class.__init__).parameters) | set(
        getattr(default, "attribute_map", {})
    )
    found = {}
    for name in names:
        try:
            found[name] = getattr(default, name, None)
        except Exception:  # it differs from layer to layer
            continue
    return found


def model_classes(model_type):
    """The classes of a family's models, that of a decoder first where it is one; none where none is known."""
    encoder = getattr(tf.CONFIG_MAPPING[model_type], "is_decoder", True) is False
    found = []
    for auto in _AUTO[1:] if encoder else _AUTO:
        name = getattr(modeling_auto, auto).get(model_type)
        name = name[0] if isinstance(name, tuple | list) else name
        if name is not None and hasattr(tf, name):
            found.append(getattr(tf, name))
    return found


def _audio(config):
    return {"input_values": torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))}


def candidates(model):
    """Inputs that the model may take, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 6), generator=generator)
    config = model.config
    names = inspect.signature(model.forward).parameters
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text = {name: value for name, value in text.items() if name in names}
    parts = [config, *(each for each in vars(config).values() if isinstance(each, tf.PretrainedConfig))]
    size = next((each.image_size for each in parts if getattr(each, "image_size", None)), 32)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    channels = next((each.num_channels for each in parts if getattr(each, "num_channels", None)), 3)
    pixels = {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 8
    length = 2 * (getattr(config, "max_source_positions", None) or 16)
    features = torch.randn(2, mels, length, generator=generator)
    found = []
    if "pixel_values" in names:
        found += [{**text, **pixels}, pixels]
    if "input_ids" in names:
        found.append(text)
    if "input_values" in names:
        found.append(_audio(config))
    if "input_features" in names:
        found += [{"input_features": features}, {"input_features": features.transpose(1, 2)}]
    if "decoder_input_ids" in names:
        found = [{**each, "decoder_input_ids": ids[:, :4]} for each in found] + found
    return found


def output_of(model, inputs):
    """The model's logits or last hidden states, or all that it returns in one row where it names neither."""
    output = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if torch.is_tensor(getattr(output, name, None)):
            return getattr(output, name).contiguous()
    values = output.values() if hasattr(output, "values") else output
    return torch.cat(
        [each.flatten() for each in values if torch.is_tensor(each) and each.is_floating_point()]
    )


def tiny_model(model_type):
    """A model in eval mode, and inputs that it runs on.

    Raises: RuntimeError: no variant of the sizes gives a model that runs; with the first variant's reason.
    """
    config_class, kinds = tf.CONFIG_MAPPING[model_type], model_classes(model_type)
    first = None
    for kind, changes in itertools.product(kinds, VARIANTS):
        try:
            torch.manual_seed(0)
            model = kind(small_config(config_class, changes)).eval()
            for parameter in model.parameters():  # an output projection of zeros would hide every adapter
                if parameter.dim() > 1 and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
            if sum(parameter.numel() for parameter in model.parameters()) > 3e7:
                raise RuntimeError("its small model has more than 30 million parameters")
        except TimeoutError:
            raise
        except Exception as error:
            first = first or error
            continue
        for inputs in candidates(model):
            try:
                with torch.no_grad():
                    output_of(model, inputs)
                return model, inputs
            except TimeoutError:
                raise
            except Exception as error:
                first = first or error
    raise RuntimeError(f"{type(first).__name__}: {first}" if first else "no inputs are known for it")
