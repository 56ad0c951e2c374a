"""What a model takes: a random batch that fits its configuration."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_LENGTH = 8


def random_batch(model: nn.Module) -> dict[str, Tensor]:
    """Arguments of the model's forward: token ids, pixels or sound, whichever it takes first.

    Raises: ValueError: it takes something else, or something else too.
    """
    parameters = inspect.signature(model.forward).parameters
    pretrained: Any = next((each for each in model.modules() if hasattr(each, "main_input_name")), None)
    taken = list(parameters)
    if pretrained is not None and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        taken += inspect.signature(pretrained.forward).parameters  # a wrapper's, which hands them on
    main = getattr(pretrained, "main_input_name", None)
    if main not in taken:
        main = next((name for name in _MAKERS if name in taken), None)
    if pretrained is None or main not in _MAKERS:
        raise ValueError(
            f"batch: {type(model).__name__} takes {', '.join(parameters)}, and none of {', '.join(_MAKERS)} that a "
            "random one could be made for; give the arguments of its forward"
        )
    try:
        batch = _MAKERS[main](model, pretrained.config)
    except AttributeError as error:
        raise ValueError(
            f"batch: no {main} could be made for {type(model).__name__} ({error}); give the arguments of its forward"
        ) from error
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items() if key in taken}
    missing = [
        name
        for name, each in parameters.items()
        if each.default is each.empty
        and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        and name not in batch
    ]
    if missing:
        raise ValueError(
            f"batch: {type(model).__name__} also needs {', '.join(missing)}; give the arguments of its forward"
        )
    return batch


def _tokens(model: nn.Module, config: Any) -> dict[str, Tensor]:
    text = config.get_text_config()
    # Without padding a decoder with a classifier takes one text at a time.
    generates = getattr(model, "can_generate", lambda: False)()
    rows = 2 if generates or config.is_encoder_decoder or text.pad_token_id is not None else 1
    # Above the low ids, where special tokens such as padding and end of text live.
    ids = torch.randint(min(10, text.vocab_size - 1), text.vocab_size, (rows, _LENGTH), device="cpu")
    if config.is_encoder_decoder and isinstance(text.eos_token_id, int) and not generates:
        ids[ids == text.eos_token_id] = 0
        ids[:, -1] = text.eos_token_id  # the one token that its classifiers read at
    if _has_choices(model):
        ids = ids[:, None].repeat(1, 2, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | _decoder_tokens(config, ids)


def _decoder_tokens(config: Any, ids: Tensor) -> dict[str, Tensor]:
    return {"decoder_input_ids": ids} if config.is_encoder_decoder else {}


def _pixels(model: nn.Module, config: Any) -> dict[str, Tensor]:
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    frames = [vision.num_frames] if hasattr(vision, "num_frames") else []
    pixels = torch.randn(2, *frames, getattr(vision, "num_channels", 3), height, width, device="cpu")
    return {"pixel_values": pixels.to(_dtype(model))}


def _features(model: nn.Module, config: Any) -> dict[str, Tensor]:
    if hasattr(config, "feature_projection_input_dim"):
        shape: tuple[int, ...] = (2, 8 * _LENGTH, config.feature_projection_input_dim)
    else:  # Whisper's, of one fixed length
        shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
    features = {"input_features": torch.randn(shape, device="cpu").to(_dtype(model))}
    if not config.is_encoder_decoder:
        return features
    return features | _decoder_tokens(
        config, torch.randint(config.vocab_size // 2, config.vocab_size, (2, _LENGTH), device="cpu")
    )


def _sound(model: nn.Module, config: Any) -> dict[str, Tensor]:
    if hasattr(config, "inputs_to_logits_ratio"):
        shape: tuple[int, ...] = (2, 4 * _LENGTH * config.inputs_to_logits_ratio)
    else:  # a spectrogram
        shape = (2, config.max_length, config.num_mel_bins)
    return {"input_values": torch.randn(shape, device="cpu").to(_dtype(model))}


def _dtype(model: nn.Module) -> torch.dtype:
    return getattr(model, "dtype", torch.float32)


def _has_choices(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

    return any(
        each.__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values() for each in type(model).__mro__
    )


_MAKERS = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _sound,
}
