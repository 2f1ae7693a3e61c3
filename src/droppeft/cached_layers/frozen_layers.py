"""What the first m layers of a model make of some inputs, and a model that starts behind them.

Source: ours.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from droppeft.layer_dropout.blocks import Gates
from droppeft.models.key_value_cache import without_cache


class FrozenLayers:
    """The layers of a model below some depth, in which nothing is trained.

    Args:
        model: whole, its blocks inside :func:`~droppeft.layer_dropout.gated` or not.
        blocks: its L blocks.
        depth: m, from 1 to L: how many of them are frozen.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], depth: int) -> None:
        self.depth = depth
        self._model = model
        self._last = blocks[depth - 1]

    def states(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states (B, S, H) behind the prefix; the layers above do not run.

        No gradient, and evaluation mode: dropout modules of the prefix, embeddings included, are
        off. All gates of the prefix must be open.
        """
        found: list[torch.Tensor] = []

        def stop(block: nn.Module, arguments: object, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _BehindFrozenLayers

        hook = self._last.register_forward_hook(stop)
        try:
            with torch.no_grad(), without_cache(self._model), _evaluating(self._model):
                self._model(**inputs)
        except _BehindFrozenLayers:
            pass
        finally:
            hook.remove()
        [states] = found
        return states

    def open(self, gates: Gates) -> None:
        """Open all gates, as :meth:`states` needs them."""
        gates.active, gates.stand_ins = (True,) * len(gates.active), {}

    def skip(self, gates: Gates, active: Sequence[bool], states: torch.Tensor) -> None:
        """Set the gates of a step in which the prefix does not run but ``states`` stand for it.

        Args:
            active: L gates; those of the prefix are closed, whatever they are here.
            states: (B, S, H), as :meth:`states` gave them.
        """
        gates.active = (False,) * self.depth + tuple(active[self.depth :])
        gates.stand_ins = {self.depth - 1: states}


class _BehindFrozenLayers(Exception):
    """Ends a forward whose rest nobody needs."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
