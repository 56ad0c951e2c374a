"""Soft prompts: learned embeddings in front of the input (Lester et al., arXiv:2104.08691)."""

from dataclasses import dataclass
from typing import ClassVar

from fastadapter.methods.config import MAX_PREFIX_LEN, MethodConfig, require_count, settle_init

INITS = ("vocabulary", "random")


@dataclass(frozen=True)
class SoftPromptConfig(MethodConfig):
    """What to attach.

    Args:
        prompt_len: learned embeddings, 1 to 1024.
        init: ``"vocabulary"``: embeddings of tokens drawn from the vocabulary; ``"random"``: N(0, 1) times the
            standard deviation of the model's embeddings; ``"text"``: embeddings of ``init_text``. ``None``: ``"text"``
            where there is one, else ``"vocabulary"``. A model of images has no vocabulary: ``"random"`` alone, and
            uniform in Glorot's bounds between a patch and the hidden size.
        init_text: a text, or several that are put one after another, whose tokens are repeated or cut to
            ``prompt_len``; :func:`fastadapter.attach` then needs the tokenizer.
        modules_to_save: dotted names, or their ends, of modules that the adapter trains and keeps copies of, besides
            the heads that are new to the task.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> SoftPromptConfig(prompt_len=8).init
    'vocabulary'
    """

    prompt_len: int = 20
    init: str | None = None
    init_text: str | tuple[str, ...] | None = None

    method: ClassVar[str] = "soft-prompt"

    def __post_init__(self):
        super().__post_init__()
        require_count("prompt_len", self.prompt_len, MAX_PREFIX_LEN)
        if self.init == "vocabulary" and self.init_text is not None:  # what a text meant in files of before
            object.__setattr__(self, "init", None)
        settle_init(self, INITS)
