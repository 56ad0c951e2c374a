"""Plain PyTorch definitions of every operation: the specification the kernels answer to."""

from fastadapter.reference.bottleneck import bottleneck, bottleneck_backward
from fastadapter.reference.gated_prefix import gated_prefix, gated_prefix_backward

__all__ = ["bottleneck", "bottleneck_backward", "gated_prefix", "gated_prefix_backward"]
