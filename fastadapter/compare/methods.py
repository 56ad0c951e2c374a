"""What is compared, and the learning rate of each: the one place for both.

They are the best of ``scripts/sweep_learning_rates.py`` on training records of the reviews alone (few candidates, one
seed; ``benchmarks/results/learning_rates_*.json``): for encoders after 100 steps, from random starts; for decoders after
50 steps (``last-blocks``; prompts and prefixes from text, ``llama-adapter-v2`` from a random start) or only 16 (the
others; ``parallel`` has the rate of ``pfeiffer``). From a random start 0.01 was better for ``soft-prompt``. ``houlsby``
on encoders is a step below the best, at which one seed of two got stuck at the loss of chance for 800 steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastadapter.methods import METHODS
from fastadapter.training import UserError, from_text, task_text

ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as on the command line and in the table.
        kind: ``"features"`` (nothing of the model is trained), ``"in-context"`` (nothing at all), ``"parameters"``
            (some of its own) or ``"adapter"``.
        learning_rates: by kind of model; of AdamW. Where nothing is trained by it there is none.
        head_learning_rates: of the head beside an adapter, by kind of model; where there is none, the adapter's.
        blocks: of parameters, how many of the top blocks beside all that follows them; ``None``: everything.
        adapter: of an adapter, its name in ``fastadapter.methods.METHODS``.
        options: fields of its configuration; of in-context, the text in front of every record.
        article: test accuracy in the article, of DistilBERT on 50,000 movie reviews, where it has this row.
    """

    name: str
    kind: str
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    head_learning_rates: Mapping[str, float] = field(default_factory=dict)
    blocks: int | None = None
    adapter: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    article: float | None = None


def _rates(encoder: float, decoder: float) -> dict[str, float]:
    return {ENCODER: encoder, DECODER: decoder}


_TABLE = (
    Method("features", "features", article=0.83),
    Method("in-context", "in-context"),
    # What the article calls the last two layers: in DistilBERT the linear layers behind the blocks.
    Method("last-layers", "parameters", _rates(3e-3, 1e-2), blocks=0, article=0.87),
    Method("last-blocks", "parameters", _rates(3e-4, 3e-4), blocks=2),
    Method("all-layers", "parameters", _rates(1e-4, 3e-5), article=0.92),
    Method("houlsby", "adapter", _rates(1e-3, 3e-3), adapter="bottleneck", options={"placement": "houlsby"}),
    Method(
        "pfeiffer", "adapter", _rates(3e-3, 3e-3), adapter="bottleneck", options={"placement": "pfeiffer"}
    ),
    Method(
        "parallel", "adapter", _rates(3e-3, 3e-3), adapter="bottleneck", options={"placement": "parallel"}
    ),
    Method("prefix-tuning", "adapter", _rates(3e-2, 3e-3), adapter="prefix-tuning"),
    Method("soft-prompt", "adapter", _rates(3e-2, 3e-3), adapter="soft-prompt"),
    Method("llama-adapter", "adapter", _rates(3e-2, 3e-3), adapter="llama-adapter"),
    Method("llama-adapter-v2", "adapter", _rates(3e-3, 1e-3), adapter="llama-adapter-v2"),
)
METHODS_TO_COMPARE: dict[str, Method] = {method.name: method for method in _TABLE}
DEFAULT_METHODS = tuple(METHODS_TO_COMPARE)
STARTS = ("text", "random")


def resolve_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, in the order of the table.

    Raises: UserError: an unknown name, or an adapter that this release lacks, naming what there is.
    """
    if not names:
        raise UserError("methods must name at least one method")
    for name in names:
        method = METHODS_TO_COMPARE.get(name)
        if method is None:
            raise UserError(f"method {name!r} is unknown; there is {', '.join(METHODS_TO_COMPARE)}")
        if method.adapter is not None and method.adapter not in METHODS:
            raise UserError(
                f"method {name!r} needs the adapter {method.adapter!r}; this release has {', '.join(METHODS)}"
            )
    return [method for name, method in METHODS_TO_COMPARE.items() if name in names]


def with_options(
    methods: Sequence[Method],
    template: str,
    *,
    init: str = "text",
    init_text: str | None = None,
    reparam_size: int | None = None,
) -> list[Method]:
    """The methods as one comparison runs them.

    Args:
        template: of the records; what it says without them is the text that prompts and prefixes start from and that
            in-context puts in front, unless ``init_text`` is another one.
        init: ``"text"``, or ``"random"``: as each method starts by itself.
        reparam_size: of prefix tuning.
    Raises: UserError, ValueError, TypeError: naming the option.
    """
    if init not in STARTS:
        raise UserError(f"init must be one of {', '.join(STARTS)}, got {init!r}")
    if init_text is not None and init != "text":
        raise UserError(f"init_text goes with init 'text', got init {init!r}")
    if init_text is not None and not init_text.strip():
        raise UserError(f"init_text must hold a word, got {init_text!r}")
    if reparam_size is not None and not any(method.adapter == "prefix-tuning" for method in methods):
        raise UserError(f"reparam_size {reparam_size} is of prefix-tuning, which is not among the methods")
    text = task_text(template) if init_text is None else init_text
    made = []
    for method in methods:
        options = dict(method.options)
        if method.kind == "in-context":
            options["init_text"] = text or ""
        elif method.adapter is not None:
            if method.adapter == "prefix-tuning" and reparam_size is not None:
                options["reparam_size"] = reparam_size
            config: Any = METHODS[method.adapter](**options)
            if init_text is not None and hasattr(config, "init_text"):
                options["init_text"] = init_text
                METHODS[method.adapter](**options)  # refuses what does not go together
            elif init == "text" and from_text(config, text) is not config:
                options["init_text"] = text
        made.append(replace(method, options=options))
    return made
