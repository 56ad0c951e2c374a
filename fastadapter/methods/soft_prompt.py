"""Soft prompts: learned embeddings in front of the input (Lester et al., arXiv:2104.08691)."""

from dataclasses import dataclass
from typing import ClassVar

from fastadapter.methods.config import MAX_PREFIX_LEN, MethodConfig, require_choice, require_count

INITS = ("vocabulary", "random")


@dataclass(frozen=True)
class SoftPromptConfig(MethodConfig):
    """What to attach.

    Args:
        prompt_len: learned embeddings, 1 to 1024.
        init: ``"vocabulary"``: embeddings of tokens drawn from the vocabulary; ``"random"``: N(0, 1) times the
            standard deviation of the model's embeddings. A model of images has no vocabulary: ``"random"`` alone, and
            uniform in Glorot's bounds between a patch and the hidden size.
        init_text: text whose token embeddings the prompt starts from, repeated or cut to ``prompt_len``;
            :func:`fastadapter.attach` then needs the tokenizer.
        modules_to_save: dotted names, or their ends, of modules that the adapter trains and keeps copies of, besides
            the heads that are new to the task.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> SoftPromptConfig(prompt_len=8).init
    'vocabulary'
    """

    prompt_len: int = 20
    init: str = "vocabulary"
    init_text: str | None = None

    method: ClassVar[str] = "soft-prompt"

    def __post_init__(self):
        super().__post_init__()
        require_count("prompt_len", self.prompt_len, MAX_PREFIX_LEN)
        require_choice("init", self.init, INITS)
        if self.init_text is not None and not isinstance(self.init_text, str):
            raise TypeError(f"init_text must be a string or None, got {self.init_text!r}")
        if self.init_text is not None and not self.init_text.strip():
            raise ValueError("init_text must hold a word, got none")
