"""FastAdapter: fused soft prompts, prefix tuning, bottleneck adapters and LLaMA-Adapter."""

from fastadapter import _source_tree

if (_root := _source_tree.checkout()) is not None:
    __path__.append(
        str(_root)
    )  # where fastadapter.kernels and fastadapter.benchmarks are before an installation

from fastadapter import nn, ops, reference
from fastadapter.checkpoints import CheckpointError, load, save
from fastadapter.explain import explain
from fastadapter.integrations.verbs.attach import attach, detach
from fastadapter.integrations.verbs.choose import rows, set_active, trainable_parameters
from fastadapter.integrations.verbs.fold import fold, unfold
from fastadapter.methods import (
    BottleneckConfig,
    LlamaAdapterConfig,
    LlamaAdapterV2Config,
    PrefixTuningConfig,
    SoftPromptConfig,
)
from fastadapter.verify import VerificationError, verify
from fastadapter.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "BottleneckConfig",
    "CheckpointError",
    "LlamaAdapterConfig",
    "LlamaAdapterV2Config",
    "PrefixTuningConfig",
    "SoftPromptConfig",
    "VerificationError",
    "attach",
    "detach",
    "explain",
    "fold",
    "load",
    "nn",
    "ops",
    "reference",
    "rows",
    "save",
    "set_active",
    "trainable_parameters",
    "unfold",
    "verify",
    "warmup",
]
