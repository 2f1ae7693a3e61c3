"""Runs the first m layers of a model alone, or a model without them from their output.

Ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from droppeft.layer_dropout.blocks import Gates
from droppeft.layer_dropout.modes import Mode
from droppeft.models.evaluation_mode import evaluating
from droppeft.models.key_value_cache import without_cache


class FrozenLayers:
    """The first layers of a model, in which nothing is trained.

    Args:
        model: the whole model, inside or outside of :func:`~droppeft.layer_dropout.gated`.
        blocks: its L blocks.
        depth: number m of frozen layers, from 1 to L.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], depth: int) -> None:
        self.depth = depth
        self._model = model
        self._last = blocks[depth - 1]

    def states(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the hidden states (B, S, H) after the frozen layers; later layers do not run.

        Runs without gradients and in evaluation mode, so that dropout modules are off, those of
        the embeddings included. All gates of the frozen layers must be open.
        """
        outputs: list[torch.Tensor] = []

        def stop(block: nn.Module, arguments: object, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise _FrozenLayersDone

        hook = self._last.register_forward_hook(stop)
        try:
            with torch.no_grad(), without_cache(self._model), evaluating(self._model):
                self._model(**inputs)
        except _FrozenLayersDone:
            pass
        finally:
            hook.remove()
        [states] = outputs
        return states

    def open(self, gates: Gates) -> None:
        """Open all gates, as :meth:`states` requires."""
        gates.modes, gates.replacements = (Mode.TRAIN,) * len(gates.modes), {}

    def skip(self, gates: Gates, modes: Sequence[Mode], states: torch.Tensor) -> None:
        """Set the gates of a step in which ``states`` replace the frozen layers.

        Args:
            gates: the gates to set.
            modes: L modes of the step; those of the frozen layers are ignored.
            states: (B, S, H), as :meth:`states` returned them.
        """
        gates.modes = (Mode.CACHED,) * self.depth + tuple(modes[self.depth :])
        gates.replacements = {self.depth - 1: states}


class _FrozenLayersDone(Exception):
    """Ends a forward pass after the frozen layers."""
