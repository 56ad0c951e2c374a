"""The mistakes that scripts/mutate.py plants."""

from .cpp import CPP
from .integrations import INTEGRATIONS
from .ops import OPS
from .record import Mutation
from .training import TRAINING
from .triton_attention import ATTENTION
from .triton_bottleneck import BOTTLENECK
from .triton_gated_prefix import GATED_PREFIX

MUTATIONS: list[Mutation] = [*OPS, *GATED_PREFIX, *ATTENTION, *BOTTLENECK, *CPP, *TRAINING, *INTEGRATIONS]
