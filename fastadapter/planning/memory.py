"""What a training step holds at its largest moment: weights, what autograd keeps, logits, the optimiser.

Of a frozen matrix nothing is kept; a norm keeps its input (RMSNorm in fp32), attention keeps query, key, value and
output, a gated feed-forward part the gate's input and both factors, on a CPU with an adapter of ours its two inputs.
"""

import dataclasses
from dataclasses import dataclass

from fastadapter.methods import (
    BottleneckConfig,
    LlamaAdapterConfig,
    LlamaAdapterV2Config,
    PrefixTuningConfig,
)
from fastadapter.planning.cost import BYTES, Job, logits_at_once, with_prompt
from fastadapter.planning.lengths import Workload

# The driver's context and libraries on a card; an assumption.
CONTEXT = 0.6 * 2**30
# Of each logit: log-probability and its gradient in fp32, and both in half precision; or three times fp32.
LOGIT = 12


@dataclass(frozen=True)
class Memory:
    """Bytes; ``step`` is what a step needs above the model that lies there already."""

    weights: float
    trained: float
    activations: float
    logits: float
    context: float

    @property
    def step(self) -> float:
        return self.activations + self.logits

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.step + self.context


def step_memory(job: Job, load: Workload, *, cpu: bool = False) -> Memory:
    """Of the largest forward pass."""
    s = BYTES[job.dtype]
    shape = job.shape
    largest = dataclasses.replace(
        load,
        tokens=load.largest_tokens,
        learned=load.largest_learned,
        rows=load.rows * load.largest_tokens / load.tokens,
    )
    seen = with_prompt(job, largest)
    if job.implementation == "fastadapter" and shape.causal:
        seen = largest
    blocks = shape.num_hidden_layers - job.lowest
    parts = _kept(job, cpu)
    whole = sum(parts.values())
    lowest = whole - sum(size for part, size in parts.items() if part in job.below)
    if job.gradient_checkpointing:
        kept = blocks * shape.hidden_size * s + whole + _adapter_kept(job)
    else:
        everywhere = isinstance(job.config, LlamaAdapterV2Config)  # its scales are, whatever --layers says
        kept = (blocks - 1) * whole + lowest + (blocks if everywhere else job.adapted) * _adapter_kept(job)
    last = shape.hidden_size * (4 + s)  # the last norm's input, and the gradient that comes back
    counted = largest.tokens if job.all_logits else largest.learned
    trained = 0 if job.implementation == "frozen" else 16 * job.trained_parameters()
    return Memory(
        weights=shape.parameters * s,
        trained=trained,
        activations=seen.tokens * (kept + last),
        logits=LOGIT * logits_at_once(job, counted),
        context=0 if cpu else CONTEXT,
    )


def _kept(job: Job, cpu: bool) -> dict[str, float]:
    """Bytes per token that one block without an adapter keeps for its backward, by part."""
    shape, s = job.shape, BYTES[job.dtype]
    ours = cpu and job.implementation == "fastadapter"  # norms and gated parts through our kernels
    norm = (4 if shape.rms_norm and not ours else s) * shape.hidden_size
    factors = (2 if ours else 3) if shape.gated else 1
    return {
        "norm1": norm,
        "attention": 2 * s * (shape.query_size + shape.kv_size) + 4 * shape.num_attention_heads,
        "norm2": norm,
        "mlp": factors * s * shape.intermediate_size,
    }


def _adapter_kept(job: Job) -> float:
    """The same of the adapter of one block."""
    shape, s, config = job.shape, BYTES[job.dtype], job.config
    peft = job.implementation == "peft"
    if job.implementation == "frozen":
        return 0
    if isinstance(config, BottleneckConfig):
        inner = 2 * config.size_for(shape.hidden_size) if peft else 0
        return job.sites * s * (shape.hidden_size + inner)
    if isinstance(config, LlamaAdapterV2Config):
        # inputs of all matrices, for their scales, and the norms' own
        return s * (4 * shape.hidden_size + shape.intermediate_size)
    if not peft:
        return 0
    if isinstance(config, LlamaAdapterConfig):
        return s * (shape.query_size + shape.num_attention_heads * config.prefix_len)
    if isinstance(config, PrefixTuningConfig):  # keys and values joined, and repeated for every head
        return 2 * s * shape.query_size
    return 0
