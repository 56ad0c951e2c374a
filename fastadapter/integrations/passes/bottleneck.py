"""Bottleneck adapters in a model: hooks on parts of its blocks, and where these parts are in each family."""

import functools
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastadapter.integrations.passes.choice import State, left_behind
from fastadapter.integrations.passes.host import Host
from fastadapter.nn import Bottleneck
from fastadapter.nn.bottleneck import operands
from fastadapter.ops import bottleneck, prepared
from fastadapter.ops.backends import choose_backend
from fastadapter.ops.bottleneck import run_forward


class Points(NamedTuple):
    """Paths within a block; ``-1`` is the last child of a list.

    ``attention`` and ``ffn``: their output, or its first element, is what is added to the residual stream.
    ``ffn_input`` and ``residual``: their input is what the feed-forward gets, behind and before the norm.
    """

    attention: str
    ffn: str
    ffn_input: str
    residual: str


_DECODER = Points("self_attn", "mlp", "mlp", "post_attention_layernorm")
# the parts' outputs go through a norm of their own before the sum
_GEMMA = Points("post_attention_layernorm", "post_feedforward_layernorm", "mlp", "pre_feedforward_layernorm")
_BERT = Points("attention.output.dropout", "output.dropout", "intermediate", "intermediate")
# by the model type of the block's own configuration
POINTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"), _DECODER),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    "gpt_neox": Points("attention", "mlp", "mlp", "post_attention_layernorm"),
    "gpt2": Points("attn", "mlp", "mlp", "ln_2"),
    "distilbert": Points("attention", "ffn", "ffn", "ffn"),
    "vit": Points("attention", "mlp", "mlp", "layernorm_after"),
    "t5": Points(
        "layer.0.SelfAttention", "layer.-1.DenseReluDense", "layer.-1.DenseReluDense", "layer.-1.layer_norm"
    ),
}


_WATCHERS = "fa_watchers"


class BottleneckHost(Host):
    """The adapters of one part of a block."""

    CHILD: ClassVar[str] = "fa_bottleneck"

    def __init__(self, state: State):
        super().__init__(state)
        self.inputs: dict[str, str | None] = {}  # None: the part's own output

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_hook(_adapt_output)]

    def add(self, name: str, adapter: nn.Module, **options: Any) -> None:
        super().add(name, adapter)
        self.inputs[name] = options.get("source")

    def remove(self, name: str) -> None:
        super().remove(name)
        del self.inputs[name]

    def kind(self, adapter: nn.Module) -> Any:
        assert isinstance(adapter, Bottleneck)
        name = next(key for key, each in self.adapters.items() if each is adapter)
        scale = "learned" if torch.is_tensor(adapter.scale) else adapter.scale
        shapes = tuple(tuple(parameter.shape) for parameter in adapter.parameters())
        norm = type(adapter.norm), adapter.norm_eps
        return shapes, adapter.activation, scale, norm, adapter.down_proj.bias is None, self.inputs[name]

    def adapt(self, output: Tensor) -> Tensor:
        """What a part's ``output (batch, ..., hidden_size)`` becomes."""
        adapted = output
        inputs = left_behind()
        for group in self.groups(output.shape[0], output.device):
            source = self.inputs[group.names[0]]
            # what a part gets and what it returns can differ in dtype: under autocast, and in T5 in fp16
            x = output if source is None else inputs[self.key, source].to(output.dtype)
            bank = [self.adapter(name) for name in group.names]
            stacked = group.row_ids is not None
            rounded = not torch.is_grad_enabled() and _multiplies_rounded(x)
            join = functools.partial(operands, bank, x.dtype, stacked=stacked, rounded=rounded)
            key = (group.names, x.dtype, rounded)
            arguments = self.keep(key, functools.partial(list, bank), join)
            if source is None and group.members is None:
                self._settle_one(arguments, x.dtype, key)
            adapted = bottleneck(x, residual=adapted, row_ids=group.row_ids, **arguments)
        for source in ("ffn", "residual"):
            inputs.pop((self.key, source), None)
        return adapted

    def _settle_one(self, arguments: dict[str, Any], dtype: torch.dtype, key: Any) -> None:
        """One adapter for all rows, by the kernel of a CPU or GPU without a look at what was checked."""
        if not self.keeps() or arguments["norm"] is not None:
            return
        names = ("down_weight", "up_weight", "down_bias", "up_bias")
        weights = [arguments[name] for name in names]
        if weights[0].dim() == 2:  # kept for a mixed batch, they are a bank already
            weights = [None if each is None else each[None] for each in weights]
        backend = choose_backend("auto", weights[0].device.type, dtype, "bottleneck")
        activation, scale = arguments["activation"], float(arguments["scale"])
        rest = (None, None, None, activation, "none", 0.0, scale)
        repeated = None
        if backend == "cpp" and prepared.ERROR is None:
            prepare = prepared.prepare_bottleneck
            repeated = prepared.Repeated(lambda x: prepare(x, *weights, None, activation, scale))

        def act(output: Tensor) -> Tensor | None:
            if output.dtype is not dtype or output.dim() != 3:
                return None
            if repeated is not None:
                rows, columns, _ = output.shape
                adapted = repeated(rows * columns, output)
                if adapted is not None:
                    return adapted
            return run_forward(backend, output, *weights, output, *rest)

        self.settle(act, key)


def _multiplies_rounded(x: Tensor) -> bool:
    """Whether the op rounds fp32 weights beside ``x``, so that it is worth keeping them rounded."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)


def _adapt_output(module: nn.Module, args: tuple, output: Any) -> Any:
    host = module._modules.get(BottleneckHost.CHILD)
    if host is None:
        return None
    inner = output if torch.is_tensor(output) else output[0]
    step = host.step()
    adapted = None
    if step is not None:
        if step.act is None:
            return None
        adapted = step.act(inner)
    if adapted is None:
        if host.idle():
            host.settle_idle()
            return None
        adapted = host.adapt(inner)
    return adapted if inner is output else (adapted, *output[1:])


class Watch:
    """Lets ``host`` see what ``module`` is given, until its own part ends, under the name ``source``."""

    def __init__(self, module: nn.Module, host: BottleneckHost, source: str):
        # in a list, so that the host does not become a child here too
        module.__dict__.setdefault(_WATCHERS, []).append((host, source))
        self._module, self._entry = module, (host, source)
        self._handle = module.register_forward_pre_hook(_show_input, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()
        watchers = self._module.__dict__[_WATCHERS]
        watchers.remove(self._entry)
        if not watchers:
            del self._module.__dict__[_WATCHERS]


def _show_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    for host, source in module.__dict__.get(_WATCHERS, ()):
        if not host.idle():
            left_behind()[host.key, source] = args[0] if args else next(iter(kwargs.values()))


def resolve(block: nn.Module, path: str) -> str:
    """The path with ``-1`` replaced by the last child's name."""
    names: list[str] = []
    for name in path.split("."):
        if name == "-1":
            name = list(block.get_submodule(".".join(names)).named_children())[-1][0]
        names.append(name)
    return ".".join(names)
