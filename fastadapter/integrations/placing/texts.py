"""Starts from a text: its tokens, and what the frozen model makes of them in every layer.

A decoder reads the text as it would in front of the caller's: with rotary embeddings at the positions before 0, so
that a prefix of the keys and values found is that text in context. A model with learned positions reads it at its first
ones, where the caller's text begins too.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts import discovery
from fastadapter.integrations.parts.blocks import ancestors
from fastadapter.integrations.passes.host import Place, host_of
from fastadapter.integrations.passes.prefix import PrefixHost
from fastadapter.integrations.passes.training import evaluating, linear_as_in_training
from fastadapter.methods import MethodConfig
from fastadapter.nn import GatedPrefix, PrefixTuning


def text_tokens(
    tokenizer: Any, texts: "str | Sequence[str]", length: int, vocabulary: int, begins: bool = True
) -> tuple[list[int], int]:
    """Tokens of texts, one behind the other, repeated or cut to ``length``; and how many stand in front of them.

    Args:
        vocabulary: how many tokens the model knows.
        begins: whether the token is kept with which the tokenizer begins a text, where it does; in front, and not
            counted in ``length``.
    Raises: ValueError: no tokenizer, a text without tokens, or tokens of another model.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: init_text needs the model's tokenizer, got None")
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    found: list[int] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"init_text {text!r} has no tokens")
        found += ids
    front = []
    begin = getattr(tokenizer, "bos_token_id", None) if begins else None
    if begin is not None and list(tokenizer(texts[0])["input_ids"])[:1] == [begin]:
        front = [begin]
    if max(front + found) >= vocabulary:
        raise ValueError(
            f"tokenizer: it gives token {max(front + found)} for init_text, the model knows those below {vocabulary}"
        )
    return front + (found * length)[:length], len(front)


def start_from_text(
    model: nn.Module, config: MethodConfig, name: str, places: Sequence[Place], tokenizer: Any
) -> None:
    """Write what the model, as if nothing were attached, makes of ``config.init_text`` into its adapter ``name``.

    Prefixes get a layer's keys and values, gated prompts what the layer itself gets.

    Raises:
        TypeError: the model does not read one text in one stack of blocks.
        ValueError: no tokenizer, or the text has no tokens, or too many for the model.
    """
    hosts = {
        path: host_of(model.get_submodule(path), PrefixHost) for path, kind in places if kind is PrefixHost
    }
    adapters = {path: host.adapter(name) for path, host in hosts.items()}
    gated = isinstance(next(iter(adapters.values())), GatedPrefix)
    paths = list(hosts)
    stack = discovery.single_stack(model, paths, "a start from a text")
    reader = _reader(model, stack)
    embeddings: Any = reader.get_input_embeddings()
    device = discovery.device_of(embeddings)
    if device.type == "meta" or any(p.is_meta for each in adapters.values() for p in each.parameters()):
        raise TypeError(
            "init='text' starts from what the model makes of a text, and its weights are on the meta device: "
            "offloaded, or not loaded yet; attach to a model that has them in memory"
        )
    causal = discovery.is_causal(model, paths)
    length: int = config.prefix_len  # type: ignore[attr-defined]
    texts: Any = config.init_text  # type: ignore[attr-defined]
    ids, front = text_tokens(tokenizer, texts, length, embeddings.weight.shape[0], causal)
    if not gated:
        ids, front = ids[:length], 0
    arguments = _arguments(model, reader, paths[0], ids, device)
    with contextlib.ExitStack() as stacked:
        found = {
            path: stacked.enter_context(_inputs(host, model.get_submodule(path)) if gated else host.taking())
            for path, host in hosts.items()
        }
        _read(reader, arguments)
    for path, taken in found.items():
        if len(taken) != 1:
            raise TypeError(
                f"{path} ({type(model.get_submodule(path)).__name__}) ran {len(taken)} times for one text, expected "
                "once: a prefix cannot start from what it makes of it"
            )
        tensors = taken[0] if isinstance(taken[0], tuple) else (taken[0],)
        if not all(bool(each.isfinite().all()) for each in tensors):
            raise ValueError(f"{path}: the model makes NaN or Inf of init_text {texts!r}")
        adapter = adapters[path]
        if isinstance(adapter, PrefixTuning):
            adapter.start_from(*tensors)
        else:
            adapter.start_from(tensors[0][0, front:])


def _reader(model: nn.Module, stack: str) -> Any:
    """The model around a list of blocks that takes token ids."""
    for path in ancestors(stack):
        module: Any = model.get_submodule(path)
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    raise TypeError(f"{type(model).__name__} takes no token ids, so nothing can start from a text")


def _arguments(
    model: nn.Module, reader: Any, path: str, ids: list[int], device: torch.device
) -> dict[str, Any]:
    parameters = inspect.signature(reader.forward).parameters
    arguments: dict[str, Any] = {"input_ids": torch.tensor([ids], device=device)}
    text_config = getattr(model.get_submodule(path), "config", None)
    if discovery.rotary_dim(model, path) is None:
        context = getattr(text_config, "max_position_embeddings", None)
        if context is not None and len(ids) >= context:
            raise ValueError(
                f"prefix_len must be less than the model's context {context} with init='text', got {len(ids)}"
            )
    elif "position_ids" in parameters:
        discovery.require_positions_before(reader, text_config, "the text of init_text")
        arguments["position_ids"] = torch.arange(-len(ids), 0, device=device)[None]
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    return arguments


@torch.no_grad()
def _read(reader: nn.Module, arguments: dict[str, Any]) -> None:
    with (
        evaluating(reader),
        linear_as_in_training(reader),
        torch.autocast(arguments["input_ids"].device.type, enabled=False),
        _uncompiled(),
    ):
        reader(**arguments)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled blocks have no place to look into; whoever compiled none is spared the import."""
    compiler = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext()


@contextlib.contextmanager
def _inputs(host: PrefixHost, attention: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that come to the projections of an attention, while the context lasts."""
    found: list[Tensor] = []
    owner = host.projection.owner(attention)
    name = next(iter(inspect.signature(owner.forward).parameters))

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs[name])

    handle = owner.register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
