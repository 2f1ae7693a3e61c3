"""The first layers of a model, when nothing in them is trained: computed once per example.

Source: FedAdapter (arXiv:2205.10162) caches activations likewise; the rest is ours.
"""

from droppeft.frozen_prefix.states import FrozenPrefix
from droppeft.frozen_prefix.store import StateStore

__all__ = ["FrozenPrefix", "StateStore"]
