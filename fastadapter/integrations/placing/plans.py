"""What each method puts where in a model: one function per method, tried out before anything is attached."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts import discovery
from fastadapter.integrations.parts.blocks import ancestors
from fastadapter.integrations.parts.heads import find_heads, named_modules, shared_parameters
from fastadapter.integrations.parts.linear import fused_weights, layers_of, linear_layers
from fastadapter.integrations.parts.projection import Projected, find_projection, input_size
from fastadapter.integrations.parts.token_mixing import reason_to_join
from fastadapter.integrations.passes.bottleneck import POINTS, BottleneckHost, resolve
from fastadapter.integrations.passes.channel_scale import CopyHost, ScaleHost
from fastadapter.integrations.passes.choice import State
from fastadapter.integrations.passes.host import Placement, ReparamHost
from fastadapter.integrations.passes.prefix import PrefixHost, PromptSlot
from fastadapter.integrations.passes.shared_softmax import require_known
from fastadapter.integrations.passes.soft_prompt_decoder import SoftPromptHost
from fastadapter.integrations.passes.soft_prompt_encoder import ImagePromptHost, encoder_of
from fastadapter.integrations.passes.training import (
    Nothing,
    WatchHost,
    accept_in_trainer,
    layers_without_backward,
    linear_as_in_training,
)
from fastadapter.integrations.placing.texts import text_tokens
from fastadapter.methods import (
    TEXT,
    BottleneckConfig,
    LlamaAdapterConfig,
    LlamaAdapterV2Config,
    MethodConfig,
    PrefixTuningConfig,
    SoftPromptConfig,
)
from fastadapter.nn import (
    Bottleneck,
    ChannelScale,
    GatedPrefix,
    ModuleCopy,
    PrefixReparam,
    PrefixTuning,
    SoftPrompt,
)


def plan(model: nn.Module, config: MethodConfig, tokenizer: Any) -> list[Placement]:
    """Everything that attaching ``config`` adds to ``model``; the model is not changed.

    Raises:
        TypeError: the model cannot be hooked, the method is not defined for it, or a head cannot be copied.
        ValueError: a size does not fit the model, or ``modules_to_save`` names what cannot be copied.
    """
    method = _PLANS.get(type(config))
    if method is None:
        known = ", ".join(each.__name__ for each in _PLANS)
        raise TypeError(f"config must be one of {known}, got {type(config).__name__}")
    if getattr(model, "is_quantized", False):
        accept_in_trainer()
    placements = method(model, config, tokenizer)
    placements += _heads(model, config, placements)
    for placement in placements:
        if isinstance(placement.adapter, ModuleCopy | SoftPrompt):
            _require_values(placement)
    taken = {placement.path for placement in placements if placement.host is ScaleHost}
    return [*placements, *(each for each in _watches(model) if each.path not in taken)]


def _require_values(placement: Placement) -> None:
    """What starts from a copy of the model's own values needs them now."""
    if any(parameter.is_meta for parameter in placement.adapter.parameters()):
        raise TypeError(
            f"{placement.path or 'the model'}: {type(placement.adapter).__name__} starts from the model's own values, "
            "and those are on the meta device: offloaded, or not loaded yet; attach to a model that has them in memory"
        )


def _llama_adapter(model: nn.Module, config: LlamaAdapterConfig, tokenizer: Any) -> list[Placement]:
    placements = []
    for path, module in discovery.attentions(model, config.layers):
        found, make = _try_projection(model, path, module, config.prefix_len)
        adapter = GatedPrefix(
            input_size(module, path),
            found.query.shape[1],
            config.prefix_len,
            gate_fn=config.gate,
            gate_per_head=config.gate_per_head,
            device=found.query.device,
        )
        placements.append(Placement(path, PrefixHost, adapter, make))
    return placements


def _llama_adapter_v2(model: nn.Module, config: LlamaAdapterV2Config, tokenizer: Any) -> list[Placement]:
    placements = _llama_adapter(model, config, tokenizer)
    linear, fused, unscaled = linear_layers(model), fused_weights(model), set()
    blocks = discovery.blocks(model).values()
    above = {holder for block in blocks for holder in ancestors(block.stack)}
    for path, module in model.named_modules():
        if ".fa_" in path:
            continue
        inside = any(path.startswith(f"{block.path}.") for block in blocks)
        # the norm behind a stack is a child of what is around the stack: of the encoder, or of the model around that
        beside = path.rpartition(".")[0] in above
        if (inside or beside) and _is_norm(module):
            placements.append(Placement(path, CopyHost, ModuleCopy(module), CopyHost))
        elif inside and path in linear and not _returns_more(layers_of(module)[-1]):
            device = discovery.device_of(layers_of(module)[-1])
            scale = ChannelScale(*linear[path], config.scale, device=device)
            placements.append(Placement(path, ScaleHost, scale, ScaleHost))
        elif inside and path in fused:
            unscaled.add(fused[path])
    if unscaled:
        warnings.warn(
            f"{type(model).__name__}: {'; '.join(sorted(unscaled))} are no linear layers, so they get no scale and no "
            "bias; LlamaAdapterV2Config scales linear layers only",
            stacklevel=4,
        )
    return placements


def _prefix_tuning(model: nn.Module, config: PrefixTuningConfig, tokenizer: Any) -> list[Placement]:
    placements = []
    reparam = None
    for path, module in discovery.attentions(model, config.layers):
        (_, key, value, _), make = _try_shared(model, path, module, config.prefix_len)
        if config.reparam_size is not None and reparam is None:
            size = input_size(module, path)
            reparam = PrefixReparam(config.prefix_len, size, config.reparam_size, device=key.device)
            holder = discovery.blocks(model)[path].stack.rpartition(".")[0]
            placements.append(Placement(holder, ReparamHost, reparam, ReparamHost))
        adapter = PrefixTuning(
            key.shape[1],
            key.shape[3],
            config.prefix_len,
            value_dim=value.shape[3],
            init="random"
            if config.init == TEXT
            else str(config.init),  # a text is read when all is in its place
            init_std=config.init_std,
            reparam=reparam,
            freeze_slots=config.freeze_slots,
            device=key.device,
        )
        placements.append(Placement(path, PrefixHost, adapter, make))
    return placements


def _soft_prompt(model: nn.Module, config: SoftPromptConfig, tokenizer: Any) -> list[Placement]:
    found = discovery.attentions(model, None)
    paths = [each for each, _ in found]
    stack = discovery.single_stack(model, paths)
    if not discovery.is_causal(model, paths):
        site = encoder_of(model, stack)
        _require_room(config.prompt_len, site.context)
        if site.host is ImagePromptHost:
            first = _first_image_prompt(site.encoder, config)
        else:
            first = _first_prompt(site.encoder.get_input_embeddings(), config, tokenizer, begins=False)
        return [Placement(site.path, site.host, SoftPrompt(first), site.make)]
    path, decoder = discovery.decoder_of(model, stack)
    text_config = found[0][1].config
    context = getattr(text_config, "max_position_embeddings", None)
    _require_room(config.prompt_len, context)
    learned = discovery.rotary_dim(model, found[0][0]) is None
    if hasattr(decoder, "embed_tokens_per_layer"):
        raise TypeError(
            f"{type(decoder).__name__} embeds token ids anew in every layer, and a soft prompt has no ids: it is not "
            "defined for this model"
        )
    discovery.require_positions_before(decoder, text_config, "a soft prompt")
    try:
        embeddings = decoder.get_input_embeddings()
    except NotImplementedError as error:
        raise TypeError(
            f"{type(decoder).__name__} has no embeddings of tokens to put a prompt among"
        ) from error
    apart = reason_to_join(decoder) is None
    make = functools.partial(SoftPromptHost, learned_positions=learned, context=context, apart=apart)
    prompt = SoftPrompt(_first_prompt(embeddings, config, tokenizer))
    placements = [Placement(path, SoftPromptHost, prompt, make)]
    if not apart:
        return placements
    for each, module in found:
        _, make_host = _try_shared(model, each, module, config.prompt_len)
        placements.append(Placement(each, PrefixHost, PromptSlot(config.prompt_len), make_host))
    return placements


def _bottleneck(model: nn.Module, config: BottleneckConfig, tokenizer: Any) -> list[Placement]:
    placements = []
    blocks: dict[str, nn.Module] = {}
    around = discovery.blocks(model)
    for path, module in discovery.attentions(model, config.layers):
        blocks.setdefault(around[path].path, module)
    for path, attention in blocks.items():
        size = input_size(attention, path)
        device = discovery.device_of(attention)
        for point, source in _points(model.get_submodule(path), path, attention, config):
            adapter = Bottleneck(
                size,
                config.size_for(size),
                activation=config.activation,
                scale=config.scale,
                bias=config.bias,
                norm=config.norm,
                init=config.init,
                device=device,
            )
            options = {} if source is None else {"source": config.parallel_input}
            watch = None if source is None else f"{path}.{source}"
            placements.append(
                Placement(f"{path}.{point}", BottleneckHost, adapter, BottleneckHost, options, watch)
            )
    return placements


def _points(
    block: nn.Module, path: str, attention: nn.Module, config: BottleneckConfig
) -> list[tuple[str, str | None]]:
    """Within a block: whose output is adapted, and whose input the adapter gets where it is not that output."""
    if config.modules is not None:
        found = [
            name
            for name, _ in block.named_modules()
            if any(name == end or name.endswith(f".{end}") for end in config.modules) and "fa_" not in name
        ]
        if not found:
            raise ValueError(f"modules: {path} has no part named {', '.join(config.modules)}")
        return [(name, None) for name in found]
    family = str(getattr(attention.config, "model_type", None))
    if family not in POINTS:
        raise TypeError(
            f"no bottleneck points are known for {family!r}, only for {', '.join(POINTS)}; name the modules whose "
            "output is to be adapted: BottleneckConfig(modules=(...))"
        )
    points = POINTS[family]
    try:
        named = {field: resolve(block, getattr(points, field)) for field in points._fields}
        for name in named.values():
            block.get_submodule(name)
    except AttributeError as error:
        raise TypeError(f"{path}: not the block that is known for {family!r}: {error}") from error
    if config.placement == "parallel":
        return [(named["ffn"], named["ffn_input" if config.parallel_input == "ffn" else "residual"])]
    ffn: list[tuple[str, str | None]] = [(named["ffn"], None)]
    return ffn if config.placement == "pfeiffer" else [(named["attention"], None), *ffn]


def _heads(model: nn.Module, config: MethodConfig, placed: list[Placement]) -> list[Placement]:
    """Copies of what is new to the task, and of what the user names."""
    heads, bare = find_heads(model)
    if bare:
        warnings.warn(
            f"{', '.join(bare)}: parameters beside the backbone that are in no module of their own; adapters keep "
            "copies of modules alone, so these are neither trained nor saved",
            stacklevel=4,  # whoever calls attach
        )
    named = named_modules(model, config.modules_to_save or ())
    _require_copyable(model, heads, named, placed)
    heads |= {path: module for path, module in named.items() if not _inside(path, heads)}
    copied = {(each.path, each.host) for each in placed}
    shared = shared_parameters(model, heads)
    memo: dict[int, Any] = {}
    return [
        Placement(path, CopyHost, ModuleCopy(module, shared[path], memo), CopyHost)
        for path, module in heads.items()
        if (path, CopyHost) not in copied
    ]


def _require_copyable(
    model: nn.Module, heads: dict[str, nn.Module], named: dict[str, nn.Module], placed: list[Placement]
) -> None:
    """Raise ValueError unless each of the modules that the user names can be copied as a whole."""
    shared = shared_parameters(model, heads | named)
    for path in named:
        for each in placed:
            if each.host is not CopyHost and _inside(each.path, [path]):
                within = "" if each.path == path else f" in {each.path}; name parts of it"
                raise ValueError(f"modules_to_save: {path} is adapted by the method itself{within}")
        if shared[path]:
            key = f"{path}.{shared[path][0]}"
            weight = model.get_parameter(key)
            users = [
                name
                for name, parameter in model.named_parameters(remove_duplicate=False)
                if parameter is weight
            ]
            raise ValueError(
                f"modules_to_save: {key} is also {', '.join(name for name in users if name != key)}: a copy of one "
                "would part them; name both modules"
            )


def _inside(path: str, others: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in others)


def _watches(model: nn.Module) -> list[Placement]:
    """What tells of linear layers that lose the gradient; scales tell by themselves."""
    return [Placement(path, WatchHost, Nothing(), WatchHost) for path in layers_without_backward(model)]


def _require_room(prompt_len: int, context: int | None) -> None:
    if context is not None and prompt_len >= context:
        raise ValueError(f"prompt_len must be less than the model's context {context}, got {prompt_len}")


def _first_prompt(
    embeddings: nn.Module, config: SoftPromptConfig, tokenizer: Any, begins: bool = True
) -> Tensor:
    weight: Any = embeddings.weight
    if config.init_text is not None:
        ids, _ = text_tokens(tokenizer, config.init_text, config.prompt_len, weight.shape[0], begins)
        tokens = torch.tensor(ids[: config.prompt_len], device="cpu")
    else:
        tokens = torch.randint(weight.shape[0], (config.prompt_len,), device="cpu")
    with torch.no_grad():
        drawn = embeddings(tokens.to(discovery.device_of(embeddings))).float()
        if config.init == "random":
            # as wide as what the model's embeddings are, in a model that scales them too
            drawn = torch.randn(drawn.shape, device="cpu").to(drawn.device) * drawn.std()
    return drawn


def _first_image_prompt(encoder: Any, config: SoftPromptConfig) -> Tensor:
    """Uniform in Glorot's bounds between a patch's values and the hidden size, as in Visual Prompt Tuning."""
    if config.init != "random":
        raise ValueError(
            f"init must be 'random' for {type(encoder).__name__}, which has no vocabulary, got {config.init!r}"
        )
    weight = encoder.embeddings.patch_embeddings.projection.weight  # (hidden_size, channels, height, width)
    bound = (6 / (weight[0].numel() + weight.shape[0])) ** 0.5
    return (
        torch.empty(config.prompt_len, weight.shape[0], device="cpu")
        .uniform_(-bound, bound)
        .to(weight.device)
    )


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and any(True for _ in module.parameters(recurse=False))


def _returns_more(linear: nn.Module) -> bool:
    """Whether a class made of a linear layer, such as a router, returns something else than its projection."""
    if not isinstance(linear, nn.Linear) or type(linear).forward is nn.Linear.forward:
        return False
    weight = linear.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    with torch.no_grad():
        output = linear(torch.zeros(1, linear.in_features, dtype=dtype, device=weight.device))
    return not torch.is_tensor(output) or output.shape != (1, linear.out_features)


def _try_projection(
    model: nn.Module, path: str, module: nn.Module, prefix_len: int
) -> tuple[Projected, Callable[[State], PrefixHost]]:
    """What one attention makes of a drawn prompt, and how to make its host.

    Raises: TypeError: the attention cannot be hooked.
    """
    if getattr(module, "reorder_and_upcast_attn", False):
        raise TypeError(
            f"{path}: reorder_and_upcast_attn=True makes GPT-2 bypass the attention interface; set it to False"
        )
    device = discovery.device_of(module)
    # Drawn, not zeros, and more than one: with equal rows a wrong projection could pass for the right one.
    shape = (1, max(2, prefix_len), input_size(module, path))
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    try:
        with torch.no_grad(), linear_as_in_training(module):
            projection, found = find_projection(
                model, path, rows.to(device, discovery.floating_dtype(module))
            )
    except TypeError as error:
        raise TypeError(f"{path} ({type(module).__name__}) cannot project a prompt: {error}") from error
    return found, functools.partial(PrefixHost, projection=projection)


def _try_shared(
    model: nn.Module, path: str, module: nn.Module, prefix_len: int
) -> tuple[Projected, Callable[[State], PrefixHost]]:
    """The same for what goes into the attention's own softmax.

    Raises: TypeError: the attention cannot be hooked, or its softmax is more than one over its keys.
    """
    found, make = _try_projection(model, path, module, prefix_len)
    try:
        require_known(found.options)
    except ValueError as error:
        raise TypeError(f"{path} ({type(module).__name__}): {error}") from error
    return found, make


_PLANS: dict[type, Callable[..., list[Placement]]] = {
    LlamaAdapterConfig: _llama_adapter,
    LlamaAdapterV2Config: _llama_adapter_v2,
    PrefixTuningConfig: _prefix_tuning,
    SoftPromptConfig: _soft_prompt,
    BottleneckConfig: _bottleneck,
}
