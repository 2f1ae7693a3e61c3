"""The first layers of a model, when nothing in them is trained: computed once per example.

Source: FedAdapter (arXiv:2205.10162) caches activations likewise; the rest is ours.
"""

from droppeft.cached_layers.frozen_layers import FrozenLayers
from droppeft.cached_layers.state_store import StateStore

__all__ = ["FrozenLayers", "StateStore"]
