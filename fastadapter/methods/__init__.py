"""One file per method: its configuration, which says what to add to a model."""

from fastadapter.methods.bottleneck import BottleneckConfig
from fastadapter.methods.config import TEXT, MethodConfig
from fastadapter.methods.llama_adapter import LlamaAdapterConfig, LlamaAdapterV2Config
from fastadapter.methods.prefix_tuning import PrefixTuningConfig
from fastadapter.methods.soft_prompt import SoftPromptConfig

# How a checkpoint or a command line names each method.
METHODS: dict[str, type[MethodConfig]] = {
    config.method: config
    for config in (
        LlamaAdapterConfig,
        LlamaAdapterV2Config,
        PrefixTuningConfig,
        SoftPromptConfig,
        BottleneckConfig,
    )
}

__all__ = [
    "METHODS",
    "TEXT",
    "BottleneckConfig",
    "LlamaAdapterConfig",
    "LlamaAdapterV2Config",
    "MethodConfig",
    "PrefixTuningConfig",
    "SoftPromptConfig",
]
