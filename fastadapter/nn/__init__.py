"""Drop-in modules: parameters, initialisation and one op call each."""

from fastadapter.nn.bottleneck import Bottleneck
from fastadapter.nn.channel_scale import ChannelScale
from fastadapter.nn.gated_prefix import GatedPrefix
from fastadapter.nn.module_copy import ModuleCopy
from fastadapter.nn.prefix_tuning import PrefixReparam, PrefixTuning
from fastadapter.nn.soft_prompt import SoftPrompt

__all__ = [
    "Bottleneck",
    "ChannelScale",
    "GatedPrefix",
    "ModuleCopy",
    "PrefixReparam",
    "PrefixTuning",
    "SoftPrompt",
]
