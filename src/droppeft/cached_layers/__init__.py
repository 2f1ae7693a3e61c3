"""Cached layers: the output of a model's frozen layers, computed once per row and stored.

Source: FedAdapter (arXiv:2205.10162) caches activations in the same way; the rest is ours.
"""

from droppeft.cached_layers.frozen_layers import FrozenLayers
from droppeft.cached_layers.state_store import StateStore

__all__ = ["FrozenLayers", "StateStore"]
