"""Parameters of a soft prompt."""

import torch
from torch import Tensor, nn

from fastadapter.nn.masters import Masters


class SoftPrompt(Masters):
    """Learned embeddings in front of a model's input embeddings (prompt tuning, arXiv:2104.08691).

    fp32 whatever the dtype of the model.

    Parameters: ``prompt_len * hidden_size``.

    Args:
        prompt: first values, ``(prompt_len, hidden_size)``; copied.

    >>> SoftPrompt(torch.randn(5, 32)).prompt.shape
    torch.Size([5, 32])
    """

    def __init__(self, prompt: Tensor):
        super().__init__()
        self.prompt = nn.Parameter(prompt.detach().to(torch.float32, copy=True))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The prompt in ``dtype``, ``(1, prompt_len, hidden_size)``."""
        return self.prompt.to(dtype)[None]

    def extra_repr(self) -> str:
        prompt_len, hidden_size = self.prompt.shape
        return f"prompt_len={prompt_len}, hidden_size={hidden_size}"
