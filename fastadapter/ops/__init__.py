"""Typed functions over the kernels: validation, choice of backend, registration, autograd."""

from fastadapter.ops.backends import backends
from fastadapter.ops.bottleneck import Norm, bottleneck
from fastadapter.ops.gated_prefix import gated_prefix

__all__ = ["Norm", "backends", "bottleneck", "gated_prefix"]
