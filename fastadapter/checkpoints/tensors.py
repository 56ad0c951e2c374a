"""What of a model goes into an adapter's file, by which names, and back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastadapter.checkpoints.files import Header
from fastadapter.integrations.parts.sharding import all_or_none, require_whole, reshard, write
from fastadapter.integrations.parts.wrappers import plain, unwrap
from fastadapter.integrations.verbs import base_parameters
from fastadapter.integrations.verbs.record import adapter_modules, attachments, require_unfolded

# No module can be called so, and no adapter's tensor begins with it.
_BASE = "base-parameter."


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter by the dotted name of the module they are in."""
    return {
        plain(f"{path}.{key}" if path else key): parameter
        for path, module in adapter_modules(model, name).items()
        for key, parameter in module.named_parameters()
    }


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of an adapter and its heads' running statistics, named alike."""
    found: dict[str, Tensor] = dict(adapter_parameters(model, name))
    for path, module in adapter_modules(model, name).items():
        saved = module.state_dict(keep_vars=True)
        for key, buffer in module.named_buffers():
            if key in saved:
                found[plain(f"{path}.{key}" if path else key)] = buffer
    return found


def saved_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """All that the file of adapter ``name`` holds: its own parameters, and the base model's that are trained beside it.

    Raises: ValueError: no adapter of that name; or a module around the adapted model has trainable parameters.
    """
    inner = unwrap(model)
    reshard(inner)
    found = adapter_tensors(inner, name)
    own = {id(parameter) for parameter in inner.parameters()}
    outside = [key for key, each in model.named_parameters() if each.requires_grad and id(each) not in own]
    if outside:
        raise ValueError(
            f"model: {some(outside)} of {type(model).__name__} can be trained but stands outside of the adapted "
            f"{type(inner).__name__}, so it has no place in the adapter's file: save it by other means and give save "
            f"the {type(inner).__name__} itself"
        )
    folded = attachments(inner).folded
    for key, parameter in base_parameters.trained(inner).items():
        original = None if folded is None else folded.originals.get(key)
        found[_BASE + key] = parameter if original is None else original
    return found


def base_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors of a file, the base model's own, by their names in it."""
    return {key.removeprefix(_BASE): each for key, each in tensors.items() if key.startswith(_BASE)}


def require_fitting_base(model: nn.Module, header: Header) -> None:
    """Raises: ValueError: a file holds parameters of the base model that do not fit this one."""
    for key, (dtype, shape) in header.items():
        if key.startswith(_BASE):
            base_parameters.require_fitting(model, key.removeprefix(_BASE), dtype, shape)


def set_tensors(
    model: nn.Module, name: str, tensors: dict[str, Tensor], *, allow_nonfinite: bool = False
) -> None:
    """Copy ``tensors``, named as by :func:`saved_tensors`, into the model; all of them or none.

    Raises: ValueError: a name is missing or unexpected, or a tensor has another shape or dtype, or is not finite; or
        the adapter is folded into the model's weights; or parameters of the base model would change under other
        adapters.
    """
    record = attachments(model)
    require_unfolded(record)
    reshard(model)
    base = base_part(tensors)
    given = {key: each for key, each in tensors.items() if not key.startswith(_BASE)}
    expected = adapter_tensors(model, name)
    require_whole(expected)
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"its tensors do not fit adapter {name!r}: missing {some(missing)}, unexpected {some(unexpected)}"
        )
    for key, target in expected.items():
        if given[key].dim() == 0 and target.shape == (1,):  # a learned scale of an older file
            given[key] = given[key].reshape(1)
        source = given[key]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(
                f"{key} must be {target.dtype} {tuple(target.shape)}, got {source.dtype} {tuple(source.shape)}"
            )
    for key, source in {**given, **base}.items():
        if not allow_nonfinite and not torch.isfinite(source).all():
            raise ValueError(f"{key} holds NaN or Inf (allow_nonfinite=True accepts it)")
    others = [each for each in record.configs if each != name]
    if others and (changed := base_parameters.differing(model, base)):
        raise ValueError(
            f"it holds trained parameters of the base model ({some(changed)}), which would change under the other "
            f"adapters ({', '.join(others)}); detach them first"
        )
    with all_or_none(expected):
        for key, target in expected.items():
            write(target, given[key])
        base_parameters.put(model, base, record.base_originals)


def some(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more if names else "none"
