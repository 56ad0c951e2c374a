"""FastAdapter: fused soft prompts, prefix tuning, bottleneck adapters and LLaMA-Adapter."""

from fastadapter import nn, ops, reference
from fastadapter.checkpoints import CheckpointError, load, save
from fastadapter.explain import explain
from fastadapter.integrations.transformers import attach, detach, set_active, trainable_parameters
from fastadapter.methods import LlamaAdapterConfig
from fastadapter.verify import VerificationError, verify
from fastadapter.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "LlamaAdapterConfig",
    "VerificationError",
    "attach",
    "detach",
    "explain",
    "load",
    "nn",
    "ops",
    "reference",
    "save",
    "set_active",
    "trainable_parameters",
    "verify",
    "warmup",
]
