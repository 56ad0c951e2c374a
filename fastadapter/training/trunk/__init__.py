"""The trunk of a model, the blocks below all that is trained: its hidden states, computed once per example.

``find`` watches a pass to see how far up it is the same in every epoch, ``start`` begins passes there, ``prove`` holds
such a pass against a whole one, ``store`` keeps the states in files, ``prepare`` does all of it for a run.
"""

from fastadapter.training.trunk.options import TrunkCache

__all__ = ["TrunkCache"]
