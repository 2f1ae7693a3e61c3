"""What a turn's gradients say of the model's layers, in passing: no second backward.

Ours. Everything is a mean over the steps that a layer ran in: a sum would repeat how often layers
were dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from droppeft.adapters.by_layer import Parameters

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GradientMoments:
    """Of each of the L layers, over its active steps; 0 for a layer that had no gradient.

    Attributes:
        norm: mean of the gradient's norm.
        square: mean of its square.
        square_of_mean: square of the norm of the mean gradient; ``None`` unless asked for.
    """

    norm: Vector
    square: Vector
    square_of_mean: Vector | None


class Gradients:
    """Collects a turn's gradients, of the task's loss, before clipping.

    Args:
        parameters: what is trained, by layer.
        num_layers: L.
        device: where the gradients are.
        with_mean: also collect what :attr:`Moments.square_of_mean` needs, which takes the memory
            of one more adapter.
    """

    def __init__(
        self, parameters: Parameters, num_layers: int, device: torch.device, *, with_mean: bool
    ) -> None:
        self._layers = [list(parameters.get(layer, {}).values()) for layer in range(num_layers)]
        self._device = device
        self._norms: list[torch.Tensor] = []
        self._sums = (
            [[torch.zeros_like(one) for one in layer] for layer in self._layers]
            if with_mean
            else None
        )

    def norms(self) -> torch.Tensor:
        """(L,) norms of the layers' gradients; 0 where a layer has none in this step."""
        # The norm of no gradients is a 0 on the CPU, wherever the others are.
        return torch.stack([total_norm(layer).to(self._device) for layer in self._layers])

    def add(self) -> None:
        """Add the gradients of a step, whose values are finite, to the mean."""
        for layer, sums in zip(self._layers, self._sums or [], strict=False):
            for value, total in zip(layer, sums, strict=True):
                if value.grad is not None:
                    total += value.grad

    @property
    def wants_mean(self) -> bool:
        """Whether :meth:`add` has to be called."""
        return self._sums is not None

    def note(self, norms: torch.Tensor) -> None:
        """Count a step that moved something."""
        self._norms.append(norms)

    def moments(self, active_steps: Sequence[int]) -> GradientMoments:
        """What was collected.

        Args:
            active_steps: of each layer.
        """
        steps = np.maximum(np.asarray(active_steps, dtype=np.float64), 1)
        found = torch.stack(self._norms or [torch.zeros(len(self._layers))]).double().cpu()
        means = None
        if self._sums is not None:
            squares = [sum(float(one.double().square().sum()) for one in s) for s in self._sums]
            means = np.array(squares) / steps**2
        return GradientMoments(
            norm=found.sum(dim=0).numpy() / steps,
            square=found.square().sum(dim=0).numpy() / steps,
            square_of_mean=means,
        )


def total_norm(values: Sequence[nn.Parameter]) -> torch.Tensor:
    """Norm of the gradients there are."""
    gradients = [value.grad for value in values if value.grad is not None]
    return get_total_norm(gradients).detach()
