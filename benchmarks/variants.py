"""Who takes part where LLaMA-Adapter is measured on a whole model: the floor, ours, ours on the plain op, PEFT.

All of them compute on the weights of one model (:mod:`.models`); each runs in the surroundings that belong to it.
"""

from collections.abc import Callable

from . import models

FLOOR = "frozen model"
BARE = "bare model"
MAKERS: dict[str, Callable] = {
    FLOOR: models.with_input_gradient,
    "fastadapter": models.with_fastadapter,
    "fastadapter, reference op": models.with_fastadapter,
    "PEFT": models.with_peft,
}
ADAPTED = [name for name in MAKERS if name != FLOOR]


def runs_of(name: str, body: Callable[..., object]) -> Callable[..., object]:
    """``body`` in the surroundings that belong to a variant."""
    if name == "fastadapter":
        return body

    def run(*args):
        with models.on_backend("reference") if name == "fastadapter, reference op" else models.without_hook():
            return body(*args)

    return run


def backend_of(name: str, device: str) -> str:
    if not name.startswith("fastadapter"):
        return ""
    return "reference" if name.endswith("reference op") else ("triton" if device == "cuda" else "cpp")
