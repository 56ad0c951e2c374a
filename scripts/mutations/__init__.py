"""The mistakes that scripts/mutate.py plants."""

from .cpp import CPP
from .data import DATA
from .integrations import INTEGRATIONS
from .ops import OPS
from .record import Mutation
from .training import TRAINING
from .triton_bottleneck import BOTTLENECK
from .triton_prefix_term import PREFIX_TERM
from .trunk import TRUNK

MUTATIONS: list[Mutation] = [*OPS, *PREFIX_TERM, *BOTTLENECK, *CPP, *TRAINING, *TRUNK, *DATA, *INTEGRATIONS]
