"""Train adapters: records to tokens, the supervised-token loss, and a loop that survives being killed."""

from fastadapter.integrations.passes.products import fast_products
from fastadapter.training.batching import Batch, collate, epoch_batches
from fastadapter.training.classification import class_names, classify, read_labels
from fastadapter.training.collator import DataCollatorWithPacking
from fastadapter.training.config import NonFiniteError, TrainingConfig, TrainingInterrupted, UserError
from fastadapter.training.data import (
    Encoded,
    Example,
    encode_examples,
    label_completions,
    read_examples,
    split_examples,
    without_prompts_of,
)
from fastadapter.training.evaluation import predict_labels
from fastadapter.training.judge import evaluate
from fastadapter.training.loop import finetune
from fastadapter.training.loss import (
    causal_lm_loss,
    supervised_logit_parts,
    supervised_logits,
    supervised_loss,
)
from fastadapter.training.packing import pack
from fastadapter.training.report import FinetuneResult, peak_rss_bytes, write_json
from fastadapter.training.targets import last_layers, load_parameters, training_only
from fastadapter.training.task_text import from_text, task_text
from fastadapter.training.trunk import TrunkCache

__all__ = [
    "Batch",
    "DataCollatorWithPacking",
    "Encoded",
    "Example",
    "FinetuneResult",
    "NonFiniteError",
    "TrainingConfig",
    "TrainingInterrupted",
    "TrunkCache",
    "UserError",
    "causal_lm_loss",
    "class_names",
    "classify",
    "collate",
    "encode_examples",
    "epoch_batches",
    "evaluate",
    "fast_products",
    "finetune",
    "from_text",
    "label_completions",
    "last_layers",
    "load_parameters",
    "pack",
    "peak_rss_bytes",
    "predict_labels",
    "read_examples",
    "read_labels",
    "split_examples",
    "supervised_logit_parts",
    "supervised_logits",
    "supervised_loss",
    "task_text",
    "training_only",
    "without_prompts_of",
    "write_json",
]
