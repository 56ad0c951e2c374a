"""The linear layers of a model, whatever libraries have put around them or made of their weights."""

from collections.abc import Iterator

from torch import nn

# Where a wrapper keeps what it stands for: PEFT's tuners, and its modules_to_save.
_INNER = ("base_layer", "original_module")
# Input and output width: of every torch-like linear layer, quantised ones included, and of GPT-2's Conv1D.
_SIZES = (("in_features", "out_features"), ("nx", "nf"))


def layers_of(module: nn.Module) -> list[nn.Module]:
    """``module``, and within wrappers what they stand for, from the outside in."""
    found: list[nn.Module] = []
    inner: nn.Module | None = module
    while inner is not None and not any(inner is each for each in found):
        found.append(inner)
        names = (name for name in _INNER if inner._modules.get(name) is not None)
        inner = inner._modules.get(next(names, ""))
    return found


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer, wrapped or not; ``None`` for every other module."""
    inner = layers_of(module)[-1]
    if not isinstance(
        inner, nn.Linear
    ):  # other classes have their widths under these names, as parts with layers may
        weights = (weight for weight in inner._parameters.values() if weight is not None)
        if any(weight.dim() > 2 for weight in weights) or any(
            not name.startswith("fa_") for name in inner._modules
        ):
            return None
    for names in _SIZES:
        width, out_width = (getattr(inner, name, None) for name in names)
        if isinstance(width, int) and isinstance(out_width, int):
            return width, out_width
    return None


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Input and output widths of the model's own linear layers, by their dotted paths.

    A wrapper counts as the layer that it stands for; what is inside of it (LoRA's factors) and inside of adapters does
    not count.
    """
    found = ((path, sizes(module)) for path, module in _parts(model))
    return {path: widths for path, widths in found if widths is not None}


def fused_weights(model: nn.Module) -> dict[str, str]:
    """What multiplies outside of linear layers, such as fused experts and their routers.

    Returns: the class and its weights in words, by the dotted path of the module.
    """
    found = {}
    for path, module in _parts(model):
        if sizes(module) is not None or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            continue
        inner = layers_of(module)[-1]
        weights = [
            name
            for name, weight in inner._parameters.items()
            if weight is not None and (weight.dim() == 3 or (weight.dim() == 2 and name == "weight"))
        ]
        if weights:
            found[path] = f"{', '.join(weights)} of {type(inner).__name__}"
    return found


def _parts(
    module: nn.Module, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model once, wrappers in place of what they stand for; none that an adapter brought."""
    seen = set() if seen is None else seen
    for name, child in module._modules.items():
        if child is None or name.startswith("fa_") or id(child) in seen:
            continue
        seen.add(id(child))
        below = f"{path}.{name}" if path else name
        yield below, child
        if len(layers_of(child)) == 1 and sizes(child) is None:
            yield from _parts(child, below, seen)
