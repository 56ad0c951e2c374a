"""Data: records of files, the examples they make, their split, and their tokens."""

from fastadapter.training.data.chat import encode_conversation, encode_conversations
from fastadapter.training.data.encoding import context_length, encode_examples, encode_prompt
from fastadapter.training.data.example import Encoded, Example, Message
from fastadapter.training.data.readers import MAX_RECORD_BYTES, read_records
from fastadapter.training.data.records import (
    COMPLETION_TEMPLATE,
    FIELDS,
    INSTRUCTION_TEMPLATE,
    TEMPLATE,
    read_examples,
    require_template,
)
from fastadapter.training.data.split import label_completions, split_examples, without_prompts_of
from fastadapter.training.data.tokens import any_of, special_tokens, tokenize

__all__ = [
    "COMPLETION_TEMPLATE",
    "Encoded",
    "Example",
    "FIELDS",
    "INSTRUCTION_TEMPLATE",
    "MAX_RECORD_BYTES",
    "Message",
    "TEMPLATE",
    "any_of",
    "context_length",
    "encode_conversation",
    "encode_conversations",
    "encode_examples",
    "encode_prompt",
    "label_completions",
    "read_examples",
    "read_records",
    "require_template",
    "special_tokens",
    "split_examples",
    "tokenize",
    "without_prompts_of",
]
