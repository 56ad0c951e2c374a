"""Every method's configuration for small models, and adapters that look trained."""

import torch

import fastadapter as fa

CONFIGS = {
    "llama-adapter": fa.LlamaAdapterConfig(prefix_len=4, layers=2),
    "v2-input": fa.LlamaAdapterV2Config(prefix_len=4, layers=2),
    "v2-output": fa.LlamaAdapterV2Config(prefix_len=4, layers=2, scale="output"),
    "prefix": fa.PrefixTuningConfig(prefix_len=5),
    "prefix-reparam": fa.PrefixTuningConfig(prefix_len=5, reparam_size=6),
    "soft-prompt": fa.SoftPromptConfig(prompt_len=3, init="random"),  # images have no vocabulary
    "houlsby": fa.BottleneckConfig(bottleneck_size=4),
    "pfeiffer": fa.BottleneckConfig(placement="pfeiffer", reduction_factor=4, norm="layer_norm"),
    "parallel": fa.BottleneckConfig(placement="parallel", bottleneck_size=4, scale="learned"),
    "parallel-residual": fa.BottleneckConfig(
        placement="parallel", bottleneck_size=4, scale=4.0, activation="relu", parallel_input="residual"
    ),
}
# A softmax that is shared has no state without effect.
WITH_NEUTRAL_START = [name for name in CONFIGS if not name.startswith(("prefix", "soft"))]


def train_a_little(model, seed=1):
    """Move every trainable parameter by a small random step, as an optimiser would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in fa.trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
