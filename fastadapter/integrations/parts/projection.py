"""The projection of a prompt through an attention's own weights, whatever their layout."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapter.integrations.parts.blocks import ancestors

# Keyword by which a projection asks the dispatcher for query, key and value instead of attention.
CAPTURE = "fa_capture"
_SEPARATE = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"))
_WITHOUT_A_PROMPT = ("attention_mask", "mask", "cache", "past_key_values", "layer_past", "position_bias")
# What a layer raises that is given something else than it expects.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
_LENGTHS = (5, 7)  # of two tries that tell the axis of positions from the others


class _Turn(NamedTuple):
    """One tensor of a rotary embedding that turns nothing; ``None`` in ``shape`` is the number of positions."""

    shape: tuple[int | None, ...]
    value: int
    dtype: torch.dtype | None  # None: that of the rows

    def tensor(self, rows: Tensor) -> Tensor:
        shape = [rows.shape[1] if size is None else size for size in self.shape]
        return rows.new_full(shape, self.value, dtype=self.dtype or rows.dtype)


class Projected(NamedTuple):
    """What reaches the attention function when a layer is given rows of a prompt.

    ``query (1, num_heads, prefix_len, head_dim)``, ``key`` and ``value`` with their own heads; values may have another
    width than keys (latent attention). ``options`` are the keyword arguments behind them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]


class StandIn:
    """An attention to its own forward, and to the dispatcher what asks for query, key and value.

    For layers that hand no keyword arguments down to their attention function.
    """

    def __init__(self, attention: nn.Module, captured: list[Any]):
        self.fa_attention, self.fa_captured = attention, captured

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fa_attention, name)


@dataclass(frozen=True)
class Projection:
    """How one attention makes keys and values of prompt rows: through what, and with which arguments.

    Attributes:
        turns: what the layer gets as its rotary embedding, one tensor or several; ``None`` where it gets none.
        source: the attention whose keys and values this one uses, where it has none of its own.
        by_modules: whether the key and value modules alone give the same bits as the layer's forward.
        masked: whether the layer asks for a mask (one that hides nothing).
        keywords: whether the layer hands keyword arguments down to its attention function.
    """

    turns: tuple[_Turn, ...] | None = None
    source: nn.Module | None = None
    by_modules: bool = False
    masked: bool = False
    keywords: bool = True

    def __call__(self, attention: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of prompt ``rows (1, prefix_len, hidden_size)``, each ``(1, heads, prefix_len, head_dim)``."""
        if self.by_modules:
            return project_by_modules(attention, rows)
        found = self.by_forward(attention, rows)
        return found.key, found.value

    def owner(self, attention: nn.Module) -> nn.Module:
        """The module whose children :func:`projection_modules` gives."""
        return attention if self.source is None else self.source

    def by_forward(self, attention: nn.Module, rows: Tensor) -> Projected:
        """Query, key and value of prompt rows as the layer itself computes them.

        Runs the layer's own forward with a rotary embedding that turns nothing (cos 1, sin 0, so a scaling such as
        YaRN's does not apply either: LLaMA-Adapter's prompt has no position) and takes what reaches the attention
        function. Right for any projection, norm or head layout; costs an output projection of ``prefix_len`` rows.

        Raises: what the layer raises; TypeError: it did not call its attention function.
        """
        shared: dict[Any, Any] = {}
        if self.source is not None:
            self._capture(self.source, rows, shared)
        return self._capture(attention, rows, shared)

    def _capture(self, attention: nn.Module, rows: Tensor, shared: dict[Any, Any]) -> Projected:
        captured: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = []
        arguments: dict[str, Any] = {}
        for name, parameter in _parameters(attention):
            if name == "position_embeddings" and self.turns is not None:
                tensors = tuple(turn.tensor(rows) for turn in self.turns)
                arguments[name] = tensors[0] if len(tensors) == 1 else tensors
            elif name == "position_ids":
                arguments[name] = torch.zeros(1, rows.shape[1], dtype=torch.int64, device=rows.device)
            elif name == "shared_kv_states":
                arguments[name] = shared
            elif name == "attention_mask" and self.masked:
                arguments[name] = rows.new_zeros(1, 1, rows.shape[1], rows.shape[1])
            elif parameter.default is inspect.Parameter.empty:
                arguments[name] = None
        if self.keywords:
            attention.forward(rows, **arguments, **{CAPTURE: captured})
        else:
            type(attention).forward(StandIn(attention, captured), rows, **arguments)
        if len(captured) != 1:
            raise TypeError(
                f"{type(attention).__name__} called its attention function {len(captured)} times for a prompt, "
                "expected once"
            )
        return Projected(*captured[0])


def find_projection(model: nn.Module, path: str, rows: Tensor) -> tuple[Projection, Projected]:
    """How the attention at ``path`` projects a prompt, and what it makes of ``rows``.

    Tried are the forms that the rotary embeddings around the layer have at position 0. All that a layer accepts give
    the same: a form that turns nothing leaves every width as it is.

    Raises: TypeError: it accepts none, or its keys depend on more than the row that they are of; with the reason.
    """
    attention = model.get_submodule(path)
    failure: Exception | None = None
    for projection in _projections(model, path, rows):
        try:
            found = projection.by_forward(attention, rows)
        except _REFUSALS as error:
            failure = failure or error
            continue
        _require_heads(found, rows)
        _require_rows_apart(projection, attention, rows, found)
        alone = projection.source is None and _can_project_by_modules(attention, rows, found.key, found.value)
        return replace(projection, by_modules=alone), found
    raise TypeError(_reason(attention, failure)) from failure


def _projections(model: nn.Module, path: str, rows: Tensor) -> Iterator[Projection]:
    """Ways to call a layer's forward, the likeliest first."""
    attention = model.get_submodule(path)
    source = _source(model, path)
    mask = dict(_parameters(attention)).get("attention_mask")
    for masked in (False, True) if mask is not None else (False,):
        for turns in _forms(model, path, rows):
            for keywords in (True, False):
                yield Projection(turns, source, masked=masked, keywords=keywords)


def _reason(attention: nn.Module, failure: Exception | None) -> str:
    required = [
        name
        for name, parameter in _parameters(attention)
        if parameter.default is inspect.Parameter.empty
        and name not in (*_WITHOUT_A_PROMPT, "position_embeddings", "position_ids", "shared_kv_states")
    ]
    if required:
        return f"its forward asks for {', '.join(required)}, which rows of a prompt do not have"
    asked = dict(_parameters(attention)).get("position_embeddings")
    if asked is not None and asked.default is inspect.Parameter.empty:
        return f"none of the known forms of position_embeddings goes with it ({type(failure).__name__}: {failure})"
    return f"{type(failure).__name__}: {failure}"


def _require_heads(found: Projected, rows: Tensor) -> None:
    query, key, value, _ = found
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise TypeError(f"{shapes} of a prompt are not (batch, heads, seq, head_dim)")
    length = rows.shape[1]
    if key.shape[0] != 1 or {query.shape[2], key.shape[2], value.shape[2]} != {length}:
        raise TypeError(f"{shapes} of a prompt of {length} rows: there is not one key and value per row")
    if query.shape[3] != key.shape[3] or key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise TypeError(f"{shapes} of its heads do not fit together")


def _require_rows_apart(projection: Projection, attention: nn.Module, rows: Tensor, found: Projected) -> None:
    """A convolution over keys, or a recurrence, would make of a prompt something else than rows."""
    if rows.is_meta or rows.shape[1] < 2:
        return
    turned = projection.by_forward(attention, rows.flip(1))
    for ours, theirs in ((turned.key, found.key), (turned.value, found.value)):
        if not torch.allclose(ours.flip(2).float(), theirs.float(), rtol=2e-2, atol=1e-3):
            raise TypeError(
                "the key and value of a row depend on the rows around it, so a prompt has none of its own"
            )


def _forms(model: nn.Module, path: str, rows: Tensor) -> Iterator[tuple[_Turn, ...] | None]:
    """What the layer may accept as its rotary embedding, the likeliest first; ``None`` is none at all."""
    attention = model.get_submodule(path)
    asked = dict(_parameters(attention)).get("position_embeddings")
    if asked is None or asked.default is not inspect.Parameter.empty:
        yield None
    if asked is None:
        return
    tried = set()
    for above in ancestors(path):
        for child in model.get_submodule(above).children():
            if "rotary" in type(child).__name__.lower() or "rope" in type(child).__name__.lower():
                for turns in _turns_of(child, attention, rows):
                    if turns not in tried:
                        tried.add(turns)
                        yield turns
    head_dim = getattr(attention, "head_dim", None)
    if isinstance(head_dim, int):  # a rotary embedding of something else than positions in a text
        for shape in ((1, None, head_dim), (None, head_dim)):
            yield (_Turn(shape, 1, None), _Turn(shape, 0, None))
    if asked.default is inspect.Parameter.empty:
        yield None


def _turns_of(rotary: nn.Module, attention: nn.Module, rows: Tensor) -> Iterator[tuple[_Turn, ...]]:
    """The forms that a rotary embedding has at position 0, for each kind of layer that it tells apart."""
    parameters = inspect.signature(rotary.forward).parameters
    if "position_ids" not in parameters:
        return
    rotary = _with_values(rotary, attention.config)
    kinds: list[dict[str, Any]] = [{}]
    if "layer_type" in parameters:
        own = (getattr(attention, name, None) for name in ("layer_type", "attention_type", "rope_layer_type"))
        known = getattr(rotary, "layer_types", None) or getattr(attention.config, "layer_types", None) or ()
        kinds = [{"layer_type": each} for each in dict.fromkeys([*own, *known]) if each is not None] + kinds
    for kind in kinds:
        for axes in ((), (3,)):  # time, height and width of pictures among a text
            try:
                yield _turns_at_zero(rotary, rows, axes, kind)
            except _REFUSALS:
                continue


def _turns_at_zero(
    rotary: Any, rows: Tensor, axes: tuple[int, ...], kind: dict[str, Any]
) -> tuple[_Turn, ...]:
    outputs = []
    device = next((each.device for each in rotary.buffers()), rows.device)
    for length in _LENGTHS:
        positions = torch.zeros(*axes, 1, length, dtype=torch.int64, device=device)
        like = torch.zeros(1, length, rows.shape[2], dtype=rows.dtype, device=device)
        output = rotary(like, position_ids=positions, **kind)
        outputs.append((output,) if torch.is_tensor(output) else tuple(output))
    turns = []
    for short, long in zip(*outputs, strict=True):
        shape = tuple(a if a == b else None for a, b in zip(short.shape, long.shape, strict=True))
        # At position 0 a sine is 0 and a cosine is 1, times a scaling that a prompt has not, in whatever order.
        nonzero = short != 0
        if not bool(nonzero.all()) and bool(nonzero.any()):
            raise ValueError("neither a sine nor a cosine")
        turns.append(_Turn(shape, int(nonzero.all()), short.dtype if short.is_complex() else None))
    return tuple(turns)


def _with_values(rotary: Any, config: Any) -> nn.Module:
    """A rotary embedding whose tables are no more than shapes (meta), made anew; any other as it is."""
    if not any(buffer.is_meta for buffer in rotary.buffers()):
        return rotary
    with torch.device("cpu"):
        return type(rotary)(getattr(rotary, "config", config))


def _source(model: nn.Module, path: str) -> nn.Module | None:
    """The attention whose keys and values the one at ``path`` uses, where that computes none itself.

    Raises: TypeError: there is none.
    """
    attention = model.get_submodule(path)
    if not getattr(attention, "is_kv_shared_layer", False):
        return None
    kind = getattr(attention, "layer_type", None)
    before = None
    for module in model.modules():
        if module is attention:
            break
        if getattr(module, "store_full_length_kv", False) and getattr(module, "layer_type", None) == kind:
            before = module
    if before is None:
        raise TypeError(
            f"it uses the keys and values of another layer, and none of type {kind!r} stands before it"
        )
    return before


def _parameters(attention: nn.Module) -> list[tuple[str, inspect.Parameter]]:
    """What the layer's forward takes behind the hidden states, by name."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    listed = list(inspect.signature(attention.forward).parameters.items())[1:]
    return [(name, parameter) for name, parameter in listed if parameter.kind not in kinds]


def projection_modules(attention: nn.Module) -> dict[str, nn.Module]:
    """The modules a prompt goes through, by name: key and value projections and key norm, or all children."""
    for names in _SEPARATE:
        if all(attention._modules.get(name) is not None for name in names):
            found = ((name, attention._modules.get(name)) for name in (*names, "k_norm"))
            return {name: module for name, module in found if module is not None}
    return {
        name: child
        for name, child in attention._modules.items()
        if child is not None and not name.startswith("fa_")
    }


def project_by_modules(attention: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same keys and values from the key and value projections alone; only used where bit-equal at attach."""
    key_module, value_module, *norms = projection_modules(attention).values()
    shape = (
        *rows.shape[:-1],
        -1,
        attention.head_dim if hasattr(attention, "head_dim") else _head_size(attention),
    )
    key, value = key_module(rows).view(shape), value_module(rows).view(shape)
    for norm in norms:
        key = norm(key)
    return key.transpose(1, 2), value.transpose(1, 2)


def _head_size(attention: nn.Module) -> int:
    for name in ("attention_head_size", "key_value_proj_dim"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise AttributeError(f"{type(attention).__name__} names no head size")


def _can_project_by_modules(attention: nn.Module, rows: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`project_by_modules` gives the bits of ``key`` and ``value`` for this layer."""
    if len(projection_modules(attention)) not in (2, 3) or rows.is_meta:
        return False
    try:
        fast_key, fast_value = project_by_modules(attention, rows)
    except _REFUSALS:  # another layout: the layer's forward knows it
        return False
    return torch.equal(fast_key, key) and torch.equal(fast_value, value)


def input_size(attention: nn.Module, path: str) -> int:
    """Width of the rows that an attention projects, by its key projection or else by its configuration.

    Raises: TypeError: neither says.
    """
    for name, _ in _SEPARATE:
        size = getattr(attention._modules.get(name), "in_features", None)
        if isinstance(size, int):
            return size
    size = getattr(getattr(attention, "config", None), "hidden_size", None)
    if not isinstance(size, int):
        raise TypeError(f"{path}: its config names no hidden_size")
    return size
