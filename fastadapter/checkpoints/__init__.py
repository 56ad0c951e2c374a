"""Reading and writing adapters. Every file is hostile until it has proven otherwise."""

from fastadapter.checkpoints import pretrained  # noqa: F401 - lets save_pretrained write adapters
from fastadapter.checkpoints.files import CheckpointError
from fastadapter.checkpoints.native import load, save

__all__ = ["CheckpointError", "load", "save"]
