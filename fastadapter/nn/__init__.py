"""Drop-in modules: parameters, initialisation and one op call each."""

from fastadapter.nn.bottleneck import Bottleneck
from fastadapter.nn.gated_prefix import GatedPrefix

__all__ = ["Bottleneck", "GatedPrefix"]
