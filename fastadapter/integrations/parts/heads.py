"""What of a model is its head: new to the task, outside the backbone. Found by structure, not by names."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from fastadapter.integrations.parts import discovery

# Tasks without labels of the user's own, by the names of transformers' automatic classes: what reads the backbone there
# is as pretrained as the backbone. Every other task gets its head from the one who trains it.
_PRETRAINED = frozenset(
    "BACKBONE CAUSAL_IMAGE_MODELING CAUSAL_LM DEPTH_ESTIMATION IMAGE IMAGE_MATTING IMAGE_TEXT_TO_TEXT IMAGE_TO_IMAGE "
    "KEYPOINT_DETECTION KEYPOINT_MATCHING MASKED_IMAGE_MODELING MASKED_LM MASK_GENERATION MULTIMODAL_LM "
    "NORMAL_ESTIMATION POINTMAP_ESTIMATION PRETRAINING RETRIEVAL RNNT SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ "
    "TABLE_RECOGNITION TDT TEXT_ENCODING TEXT_RECOGNITION TEXT_TO_SPECTROGRAM TEXT_TO_WAVEFORM TIME_SERIES_PREDICTION "
    "ZERO_SHOT_IMAGE_CLASSIFICATION ZERO_SHOT_OBJECT_DETECTION".split()
)


class Heads(NamedTuple):
    """The heads of a model.

    Attributes:
        modules: by their paths; none is in another.
        bare: names of parameters that are as new but belong to no module that could be copied.
    """

    modules: dict[str, nn.Module]
    bare: list[str]


def find_heads(model: nn.Module) -> Heads:
    """What is new to the task: the children with parameters beside the backbone, wherever that is nested.

    The backbone is what holds the self-attentions and every pretrained model within. Beside it, what transformers' own
    class puts there is new if the class is of a task without pretrained heads, or if its weights were missing when the
    rest was loaded; what a user's class puts there is. A language model's head never is, nor one whose weights are all
    the backbone's.
    """
    found = Heads({}, [])
    _visit(model, "", found, set())
    for path in [
        path for path, names in shared_parameters(model, found.modules).items() if _all(found, path, names)
    ]:
        del found.modules[path]
    return found


def named_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules called ``names``, dotted names or their ends, by their paths; none is in another.

    Raises: ValueError: no module with parameters has one of the names.
    """
    modules = {
        path: module
        for path, module in model.named_modules()
        if path and ".fa_" not in f".{path}" and any(True for _ in module.parameters())
    }
    found: dict[str, nn.Module] = {}
    for name in names:
        here = [path for path in modules if f".{path}".endswith(f".{name}")]
        if not here:
            if any(f".{key}".endswith(f".{name}") for key, _ in model.named_parameters()):
                raise ValueError(
                    f"modules_to_save: {name} is a parameter, and copies are made of modules; name the module it is in"
                )
            there = ", ".join(sorted({path.rpartition(".")[2] for path in modules}))
            raise ValueError(
                f"modules_to_save: {type(model).__name__} has no module called {name!r} with parameters; there is "
                f"{there}"
            )
        for path in here:
            found |= _callable_parts(modules[path], path)
    outer = {path for path in found if not any(path.startswith(f"{other}.") for other in found)}
    return {path: module for path, module in found.items() if path in outer}


def shared_parameters(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, list[str]]:
    """For each of the ``chosen`` modules: names in it of the parameters that modules outside of all of them use too."""
    outside = {
        id(parameter)
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if not any(key.startswith(f"{path}.") for path in chosen)
    }
    return {
        path: [key for key, parameter in own_parameters(module) if id(parameter) in outside]
        for path, module in chosen.items()
    }


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of a module without those of adapters in it."""
    return [(key, parameter) for key, parameter in module.named_parameters() if ".fa_" not in f".{key}"]


def _all(found: Heads, path: str, names: list[str]) -> bool:
    return len(names) == len(own_parameters(found.modules[path]))


def _visit(module: nn.Module, path: str, found: Heads, seen: set[int], new: bool = True) -> None:
    """Add the heads in a module that holds the backbone; ``new``: transformers' own may be among them."""
    children = {
        name: child
        for name, child in module.named_children()
        if not name.startswith("fa_") and id(child) not in seen
    }
    seen.update(map(id, children.values()))
    inner = {name: child for name, child in children.items() if _holds_backbone(child)}
    named = _named_by_transformers(type(module))
    # Blocks of a class that is not transformers': it is a backbone itself, and what stands beside them is part of it.
    if any(name not in named and _attends_itself(child) for name, child in inner.items()):
        return
    kind = _kind(type(module))
    for name, child in inner.items():
        # Within transformers' own models, a part is new only if the whole is.
        part = new and (kind == "new" or not _is_transformers(type(module)))
        _visit(child, f"{path}.{name}".lstrip("."), found, seen, part)
    if type(module).__module__.startswith("peft."):  # what it adds is its own to train
        return
    backbone = next(iter(inner.values()), None)
    for name, child in children.items():
        if name in inner:
            continue
        if (new and _is_new_to(module, child, backbone)) if name in named else _is_a_users(module, child):
            found.modules.update(_callable_parts(child, f"{path}.{name}".lstrip("."), found.bare))
    for name, parameter in module._parameters.items():
        if parameter is not None and (new and kind == "new" if name in named else inner):
            found.bare.append(f"{path}.{name}".lstrip("."))


def _is_new_to(owner: Any, child: nn.Module, backbone: nn.Module | None) -> bool:
    """Whether a child that transformers' own class puts beside the backbone is new to the class's task."""
    kind = _kind(type(owner))
    if kind == "new":
        return backbone is not None and not _holds(child, owner, "get_input_embeddings")
    if backbone is None or kind == "base" or not _is_a_users(owner, child):
        return False
    if kind is None and getattr(owner, "base_model", owner) is owner:  # a part of a model
        return False
    return _is_loaded(backbone) and not any(_was_loaded(parameter) for _, parameter in own_parameters(child))


def _is_a_users(owner: nn.Module, child: nn.Module) -> bool:
    """Whether a child is new if no class of transformers put it there: all but the head of a language model.

    One that its files lacked cannot be told from one that was resized with the embeddings, so that is not new either.
    """
    return not _holds(child, owner, "get_output_embeddings")


def _callable_parts(module: nn.Module, path: str, bare: list[str] | None = None) -> dict[str, nn.Module]:
    """The module, or, where it only holds others and is never called (a list), those it holds."""
    if type(module).forward is not nn.Module.forward:  # type: ignore[comparison-overlap]
        return {path: module} if own_parameters(module) else {}
    if bare is not None:
        bare += [f"{path}.{name}" for name, value in module._parameters.items() if value is not None]
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if not name.startswith("fa_"):
            found |= _callable_parts(child, f"{path}.{name}", bare)
    return found


def _holds_backbone(module: nn.Module) -> bool:
    kind = _pretrained_model()
    return any(isinstance(each, kind) or discovery.uses_interface(each) for each in module.modules())


def _attends_itself(module: nn.Module) -> bool:
    """Whether it holds self-attentions that are in no pretrained model within."""
    if isinstance(module, _pretrained_model()):
        return False
    return discovery.uses_interface(module) or any(_attends_itself(child) for child in module.children())


def _holds(child: nn.Module, owner: nn.Module, getter: str) -> bool:
    """Whether the embeddings that a model names are in one of its children."""
    try:
        named = getattr(owner, getter)() if isinstance(owner, _pretrained_model()) else None
    except NotImplementedError:
        return False
    return named is not None and any(each is named for each in child.modules())


def _is_loaded(backbone: nn.Module) -> bool:
    first = next(backbone.parameters(), None)
    return first is not None and _was_loaded(first)


def _was_loaded(parameter: nn.Parameter) -> bool:
    """Whether ``from_pretrained`` found it in the files: transformers marks those, not the ones it drew."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


@functools.cache
def _pretrained_model() -> Any:
    """transformers' base class of models; a type of nothing where the library is missing."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return ()
    return PreTrainedModel


def _is_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def _named_by_transformers(kind: type) -> frozenset[str]:
    """The attributes that transformers' own constructors give to a class of theirs, or to one derived from it."""
    constructors = [vars(each).get("__init__") for each in kind.__mro__ if _is_transformers(each)]
    codes = [inspect.unwrap(each).__code__ for each in constructors if each is not None]
    return frozenset(name for code in codes for name in code.co_names)


def _kind(kind: type) -> str | None:
    """What a class of transformers, or the one it derives from, is: see :func:`_kinds`; ``None``: neither."""
    kinds = _kinds()
    return next(
        (kinds[each.__name__] for each in kind.__mro__ if _is_transformers(each) and each.__name__ in kinds),
        None,
    )


@functools.cache
def _kinds() -> dict[str, str]:
    """The automatic classes by name: ``"base"`` models, and those with a ``"pretrained"`` or a ``"new"`` head."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return {}
    found: dict[str, str] = {}
    rank = ("base", "new", "pretrained")
    for key, classes in vars(modeling_auto).items():
        if not (key.startswith("MODEL_") and key.endswith("_MAPPING_NAMES")):
            continue
        task = key.removeprefix("MODEL_").removeprefix("FOR_").removesuffix("MAPPING_NAMES").rstrip("_")
        kind = "base" if not task else "pretrained" if task in _PRETRAINED else "new"
        for names in classes.values():
            for name in [names] if isinstance(names, str) else names:
                found[name] = max(kind, found.get(name, kind), key=rank.index)
    return found
