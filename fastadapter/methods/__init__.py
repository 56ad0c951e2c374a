"""One file per method: its configuration and what it adds to a layer."""

from fastadapter.methods.llama_adapter import LlamaAdapterConfig

# How a checkpoint or a command line names each method.
METHODS = {config.method: config for config in (LlamaAdapterConfig,)}

__all__ = ["METHODS", "LlamaAdapterConfig"]
