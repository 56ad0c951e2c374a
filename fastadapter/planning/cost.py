"""Operations and bytes of a training step, part by part: the floor that predictions start from.

Every formula stands here once and is explained in ``docs/planning.md``. Sizes: ``N`` tokens, ``C`` hidden, ``S`` the
width of all query heads, ``K`` of the key heads, ``I`` of the feed-forward part, ``V`` vocabulary, ``P`` prefix or
prompt, ``r`` bottleneck, ``s`` bytes of the dtype.
"""

import dataclasses
from dataclasses import dataclass

from fastadapter.methods import (
    BottleneckConfig,
    LlamaAdapterConfig,
    LlamaAdapterV2Config,
    MethodConfig,
    PrefixTuningConfig,
    SoftPromptConfig,
)
from fastadapter.planning.hardware import Device
from fastadapter.planning.lengths import Workload
from fastadapter.planning.shapes import ModelShape
from fastadapter.training.config import UserError
from fastadapter.training.loss import MAX_LOGIT_BYTES

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
IMPLEMENTATIONS = ("fastadapter", "peft", "frozen")
PARTS = ("norm1", "qkv", "attention", "out", "norm2", "mlp")
# What of the lowest adapted block no gradient has to cross, since all that is trained lies above it.
_BELOW = {
    "prompted": ("norm1", "qkv", "attention"),
    "houlsby": ("norm1", "qkv", "attention", "out"),
    "pfeiffer": PARTS,
    "parallel": PARTS,
}
# Memory-mapped states of the trunk: read through the page cache, written to a local disk.
TRUNK_WRITE = 1e9
TRUNK_READ = 5e9
# Logits that the supervised loss makes at a time, of fp32.
MAX_LOGITS = MAX_LOGIT_BYTES // 4


@dataclass(frozen=True)
class Job:
    """One way to train one model.

    Attributes:
        config: of the method; of ``"frozen"`` only its layers count.
        implementation: ``"fastadapter"``; ``"peft"``: PEFT's form of the method, or plain modules where it has none;
            ``"frozen"``: nothing is trained, but a gradient flows down to the input of the lowest block.
        all_logits: logits of every position, as transformers' own loss has; else of those with a target.
        trunk_cache: states below the lowest adapted block are read, not computed.
        gradient_checkpointing: blocks are computed again in backward instead of kept.
    """

    shape: ModelShape
    config: MethodConfig
    implementation: str = "fastadapter"
    dtype: str = "bf16"
    all_logits: bool = False
    trunk_cache: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if self.implementation not in IMPLEMENTATIONS:
            raise UserError(
                f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {self.implementation!r}"
            )
        if self.dtype not in BYTES:
            raise UserError(f"--dtype must be one of {', '.join(BYTES)}, got {self.dtype!r}")
        layers = getattr(self.config, "layers", None)
        total = self.shape.num_hidden_layers
        if layers is not None and layers > total:
            raise UserError(f"--layers must be at most the {total} of {self.shape.name}, got {layers}")
        if self.trunk_cache and not self.lowest:
            raise UserError(
                f"--trunk-cache: {self.config.method} trains down to the first block of {self.shape.name}, so no "
                "state below it stays the same"
                + ("; adapt fewer with --layers" if self.form in ("prompted", *_BELOW) else "")
            )

    @property
    def form(self) -> str:
        """What decides how far down the gradient has to go: a key of ``_BELOW``, or ``"whole"``."""
        if self.implementation == "frozen" or isinstance(self.config, LlamaAdapterV2Config):
            return "whole"
        if isinstance(self.config, (LlamaAdapterConfig, PrefixTuningConfig)):
            return "prompted"
        return self.config.placement if isinstance(self.config, BottleneckConfig) else "whole"

    @property
    def adapted(self) -> int:
        """Blocks with an adapter."""
        return getattr(self.config, "layers", None) or self.shape.num_hidden_layers

    @property
    def lowest(self) -> int:
        """Blocks below the first that is trained."""
        if isinstance(self.config, (SoftPromptConfig, LlamaAdapterV2Config)) and self.form == "whole":
            return 0
        return self.shape.num_hidden_layers - self.adapted

    @property
    def below(self) -> tuple[str, ...]:
        """Parts of the lowest adapted block without a backward."""
        return _BELOW.get(self.form, ())

    @property
    def prompt_length(self) -> int:
        """Positions of a soft prompt."""
        return self.config.prompt_len if isinstance(self.config, SoftPromptConfig) else 0

    @property
    def sites(self) -> int:
        """Bottlenecks in a block."""
        return 2 if self.form == "houlsby" else 1

    def trained_parameters(self) -> int:
        """Numbers that the adapter has; heads of a classification come on top."""
        shape, config = self.shape, self.config
        hidden = shape.hidden_size
        if isinstance(config, SoftPromptConfig):
            return config.prompt_len * hidden
        if isinstance(config, PrefixTuningConfig):
            return self.adapted * 2 * config.prefix_len * shape.kv_size
        if isinstance(config, BottleneckConfig):
            size = config.size_for(hidden)
            return self.adapted * self.sites * (2 * hidden * size + size + hidden)
        assert isinstance(config, LlamaAdapterConfig)
        gates = shape.num_attention_heads if config.gate_per_head else 1
        count = self.adapted * (config.prefix_len * hidden + gates)
        if isinstance(config, LlamaAdapterV2Config):
            channels = sum(a + b for part in shape.linears().values() for a, b in part)
            norms = hidden * (1 if shape.rms_norm else 2)
            last = norms if shape.causal else 0  # an encoder's blocks end with a norm, and no other follows
            count += shape.num_hidden_layers * (channels + 2 * norms) + last
        return count


@dataclass(frozen=True)
class Part:
    """Work of one kind; ``kind`` says which rate bounds it: ``"product"``, ``"attention"``, ``"bytes"`` or
    ``"file"``."""

    name: str
    kind: str
    flops: float
    bytes: float

    def seconds(self, device: Device, job: Job) -> float:
        """The slower of operations and bytes."""
        rate = device.product(job.dtype)
        if self.kind == "attention":
            ours = job.implementation == "fastadapter"
            rate *= device.attention if ours else device.plain_attention
        bandwidth = TRUNK_READ if self.kind == "file" else device.gb_per_s * 1e9
        return max(self.flops / rate, self.bytes / bandwidth)


def with_prompt(job: Job, load: Workload) -> Workload:
    """The pass as the blocks see it. A decoder's own soft prompt is computed once for all rows; else once a row."""
    length = job.prompt_length
    if not length or job.implementation == "frozen":
        return load
    once = job.shape.causal and job.implementation == "fastadapter"
    copies = 1 if once else load.rows
    return dataclasses.replace(
        load,
        tokens=load.tokens + copies * length,
        squares=load.squares + 2 * length * load.tokens + copies * length**2,
    )


def forward_parts(job: Job, load: Workload, blocks: int) -> list[Part]:
    """The forward of so many blocks, without their adapters."""
    shape, s = job.shape, BYTES[job.dtype]
    load = with_prompt(job, load)
    tokens, hidden = load.tokens, shape.hidden_size
    pairs, passes = _attention(job, load)
    width = shape.query_size + shape.kv_size
    rope = 10 * s * width if shape.causal else 0
    return [
        _linears("products, forward", job, tokens, dict.fromkeys(shape.linears(), blocks)),
        Part("attention, forward", "attention", blocks * pairs, blocks * tokens * 2 * width * s * passes),
        Part(
            "norms and activations, forward",
            "bytes",
            0,
            blocks * tokens * (2 * _norm(job)[0] * hidden + 6 * s * hidden + rope + _activation(job)[0]),
        ),
    ]


def step_parts(job: Job, load: Workload) -> list[Part]:
    """Everything of one forward and backward; the optimiser's part is :func:`optimiser_parts`."""
    shape, s = job.shape, BYTES[job.dtype]
    total, lowest = shape.num_hidden_layers, job.lowest
    above = total - lowest
    parts = forward_parts(job, load, above if job.trunk_cache else total)
    if job.trunk_cache:
        parts.append(Part("states of the trunk, read", "file", 0, load.tokens * shape.hidden_size * s))
    parts += _backward(job, load, above)
    if job.gradient_checkpointing:
        parts += [
            dataclasses.replace(part, name="blocks, computed again")
            for part in forward_parts(job, load, above)
        ]
    parts += _head(job, load)
    if job.implementation != "frozen":
        parts += adapter_parts(job, load)
    merged: dict[tuple[str, str], Part] = {}
    for part in parts:
        key = part.name, part.kind
        old = merged.get(key, Part(*key, 0, 0))
        merged[key] = Part(*key, old.flops + part.flops, old.bytes + part.bytes)
    return [part for part in merged.values() if part.flops or part.bytes]


def _backward(job: Job, load: Workload, above: int) -> list[Part]:
    shape, s = job.shape, BYTES[job.dtype]
    load = with_prompt(job, load)
    crossed = {part: above - (part in job.below) for part in PARTS}
    tokens, hidden = load.tokens, shape.hidden_size
    pairs, passes = _attention(job, load)
    width = shape.query_size + shape.kv_size
    rope = 12 * s * width if shape.causal else 0
    norms = crossed["norm1"] + crossed["norm2"]
    moved = norms * _norm(job)[1] * hidden + above * 6 * s * hidden
    moved += crossed["attention"] * rope + crossed["mlp"] * _activation(job)[1]
    return [
        _linears("products, backward", job, tokens, {part: crossed[part] for part in shape.linears()}),
        Part(
            "attention, backward",
            "attention",
            crossed["attention"] * 2.5 * pairs,
            crossed["attention"] * tokens * 4 * width * s * passes,
        ),
        Part("norms and activations, backward", "bytes", 0, tokens * moved),
    ]


def _linears(name: str, job: Job, tokens: float, blocks: dict[str, int]) -> Part:
    """Products with frozen matrices: of a backward the input's gradient alone, as large as the forward."""
    s = BYTES[job.dtype]
    flops = moved = 0.0
    for part, matrices in job.shape.linears().items():
        for into, out in matrices:
            flops += blocks[part] * 2 * tokens * into * out
            moved += blocks[part] * s * (into * out + tokens * (into + out))
    return Part(name, "product", flops, moved)


def _attention(job: Job, load: Workload) -> tuple[float, float]:
    """Operations of one block's forward, and how often its tensors are moved besides once.

    PEFT's prefix comes as cached keys with a mask, so no half of the scores is left out.
    """
    half = 0.5 if job.shape.causal else 1.0
    squares = load.squares
    passes = 1.0
    if job.implementation == "peft" and isinstance(job.config, PrefixTuningConfig):
        half, passes = 1.0, 2.0
        squares += load.tokens * job.config.prefix_len
    return 4 * half * squares * job.shape.query_size, passes


def _norm(job: Job) -> tuple[float, float]:
    """Bytes per number of a norm, forward and backward: RMSNorm runs as eight kernels in fp32, LayerNorm as one."""
    s = BYTES[job.dtype]
    if not job.shape.rms_norm:
        return 2 * s, 3 * s
    return (28, 60) if s == 4 else (36, 68)


def _activation(job: Job) -> tuple[float, float]:
    """Bytes per token of the feed-forward part's own kernels, forward and backward."""
    s, inner = BYTES[job.dtype], job.shape.intermediate_size
    return (5 * s * inner, 9 * s * inner) if job.shape.gated else (2 * s * inner, 3 * s * inner)


def logits_at_once(job: Job, count: float) -> float:
    """Logits that exist together, of ``count`` positions: all, or what a piece of the supervised loss holds."""
    logits = count * job.shape.vocab_size if job.shape.causal else 0
    return logits if job.all_logits else min(logits, MAX_LOGITS)


def _head(job: Job, load: Workload) -> list[Part]:
    """Logits where a target is, or everywhere, the loss, and the gradient of the states; pieces are made twice."""
    shape = job.shape
    count = load.tokens if job.all_logits else load.learned
    logits = count * shape.vocab_size if shape.causal else 0
    products = 3 if logits > logits_at_once(job, count) else 2
    flops = products * 2 * count * shape.head_parameters
    moved = products * shape.head_parameters * BYTES[job.dtype] if count else 0
    return [
        Part("head", "product", flops, moved),
        Part("loss", "bytes", 0, 8 * 4 * logits),
    ]


def adapter_parts(job: Job, load: Workload) -> list[Part]:
    """What the adapter adds, forward and backward."""
    if isinstance(job.config, SoftPromptConfig):
        return []  # its positions are counted with the others
    return [
        part
        for direction in ("forward", "backward")
        for part in _scaled(job, op_parts(job, load, direction), job.adapted)
    ] + (_scale_and_norms(job, load) if isinstance(job.config, LlamaAdapterV2Config) else [])


def _scaled(job: Job, parts: list[Part], times: float) -> list[Part]:
    return [dataclasses.replace(part, flops=part.flops * times, bytes=part.bytes * times) for part in parts]


def op_parts(job: Job, load: Workload, direction: str) -> list[Part]:
    """The adapter of one block, one direction; parts that lie in a library's products are apart."""
    shape, s, config = job.shape, BYTES[job.dtype], job.config
    tokens, hidden = load.tokens, shape.hidden_size
    forward, peft = direction == "forward", job.implementation == "peft"
    name = f"adapter, {direction}"
    if isinstance(config, BottleneckConfig):
        size, sites = config.size_for(hidden), job.sites
        moved = (6, 8) if peft else (2, 3)
        flops = (4 if forward else (8 if peft else 10)) * tokens * hidden * size
        return [Part(name, "product", sites * flops, sites * moved[not forward] * tokens * hidden * s)]
    prefix = config.prefix_len  # type: ignore[attr-defined]
    query = shape.query_size
    term = (4 if forward else 10) * tokens * query * prefix
    if isinstance(config, PrefixTuningConfig):
        if peft:  # inside the attention already; keys and values of all rows are joined with the prefix
            return [Part(name, "bytes", 0, 4 * tokens * shape.kv_size * s)]
        return [Part(name, "product", term, (3 if forward else 4) * tokens * query * s)]
    # keys and values of the prompt come from the block's own matrices
    project = 2 * prefix * hidden * 2 * shape.kv_size
    matrices = 2 * hidden * shape.kv_size * s
    prompts = Part("adapter, keys and values of prompts", "product", project, matrices)
    if not peft:
        return [Part(name, "product", term, 3 * tokens * query * s), prompts]
    scores = 8 * 4 * tokens * shape.num_attention_heads * prefix
    again = 2 * tokens * hidden * (2 * query + (shape.kv_size if forward else 0))
    return [
        Part(name, "bytes", 0, (7 if forward else 9) * tokens * query * s + scores),
        Part(name, "product", term + again, 0),
        prompts,
    ]


def _scale_and_norms(job: Job, load: Workload) -> list[Part]:
    """LLaMA-Adapter V2's scale and bias of every matrix, and the gradients of its norms."""
    shape, s = job.shape, BYTES[job.dtype]
    channels = sum(a + b for part in shape.linears().values() for a, b in part)
    blocks = shape.num_hidden_layers
    each = load.tokens * s
    return [
        Part("adapter, forward", "bytes", 0, blocks * 2 * channels * each),
        Part("adapter, backward", "bytes", 0, blocks * (4 * channels + 6 * shape.hidden_size) * each),
    ]


def optimiser_parts(job: Job) -> list[Part]:
    """AdamW reads parameter, gradient and both moments in fp32 and writes three of them."""
    if job.implementation == "frozen":
        return []
    return [Part("optimiser", "bytes", 0, 28 * job.trained_parameters())]


def exchange_seconds(job: Job, device: Device, num_gpus: int) -> float:
    """A ring's sum of the adapter's gradients over the cards of one machine."""
    if num_gpus == 1:
        return 0.0
    size = 4 * job.trained_parameters()
    return 2 * (num_gpus - 1) / num_gpus * size / (device.link_gb_per_s * 1e9) + 20e-6 * num_gpus


def trunk_bytes(job: Job, tokens: int) -> int:
    """What the cached states of so many tokens take."""
    return tokens * job.shape.hidden_size * BYTES[job.dtype]


def trunk_seconds(job: Job, device: Device, load: Workload, tokens: int) -> float:
    """The floor of building the cache: the trunk's forward once per record, and writing."""
    blocks = forward_parts(dataclasses.replace(job, trunk_cache=False), load, job.lowest)
    computed = load.steps * load.passes * sum(part.seconds(device, job) for part in blocks)
    return computed + trunk_bytes(job, tokens) / TRUNK_WRITE
