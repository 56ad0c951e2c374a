"""Typed functions over the kernels: validation, choice of backend, registration, autograd."""

from fastadapter.ops.backends import backends
from fastadapter.ops.bottleneck import Norm, bottleneck
from fastadapter.ops.gated_prefix import gated_prefix
from fastadapter.ops.gated_prefix_attention import gated_prefix_attention
from fastadapter.ops.prefix_attention import prefix_attention
from fastadapter.ops.prefix_merge import PrefixMerge, prefix_merge
from fastadapter.ops.registration import decompositions

__all__ = [
    "Norm",
    "PrefixMerge",
    "backends",
    "bottleneck",
    "decompositions",
    "gated_prefix",
    "gated_prefix_attention",
    "prefix_attention",
    "prefix_merge",
]
