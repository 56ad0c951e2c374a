"""FastAdapter: fused soft prompts, prefix tuning, bottleneck adapters and LLaMA-Adapter."""

from fastadapter import nn, ops, reference

__all__ = ["nn", "ops", "reference"]
