"""Plain PyTorch definitions of every operation: the specification the kernels answer to."""

from fastadapter.reference.bottleneck import bottleneck, bottleneck_backward
from fastadapter.reference.gated_prefix import gated_prefix, gated_prefix_backward
from fastadapter.reference.gated_prefix_attention import (
    gated_prefix_attention,
    gated_prefix_attention_backward,
)
from fastadapter.reference.prefix_attention import (
    prefix_attention,
    prefix_attention_backward,
    prefix_merge,
    prefix_merge_base_gradients,
)

__all__ = [
    "bottleneck",
    "bottleneck_backward",
    "gated_prefix",
    "gated_prefix_attention",
    "gated_prefix_attention_backward",
    "gated_prefix_backward",
    "prefix_attention",
    "prefix_attention_backward",
    "prefix_merge",
    "prefix_merge_base_gradients",
]
