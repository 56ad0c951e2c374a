"""Typed functions over the kernels: validation, choice of backend, registration, autograd."""

from fastadapter.ops.backends import backends
from fastadapter.ops.gated_prefix import gated_prefix

__all__ = ["backends", "gated_prefix"]
