"""Moments of each layer's gradients, collected during training without another backward pass.

All values are means over the steps in which a layer ran. Sums would depend on how often a layer was
dropped. Ours.
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
    """Moments of the gradients of the L layers over their active steps; 0 without a gradient.

    Attributes:
        norm: (L,) mean norm of the gradient.
        square: (L,) mean squared norm of the gradient.
    """

    norm: Vector
    square: Vector


class Gradients:
    """Collects the gradients of the task's loss in a local training, before clipping.

    Args:
        parameters: the trained parameters, by layer.
        num_layers: number L of layers.
        device: torch device of the gradients.
    """

    def __init__(self, parameters: Parameters, num_layers: int, device: torch.device) -> None:
        self._layers = [list(parameters.get(layer, {}).values()) for layer in range(num_layers)]
        self._device = device
        self._norms: list[torch.Tensor] = []

    def norms(self) -> torch.Tensor:
        """Return the (L,) norms of the layers' gradients; 0 if a layer has none in this step."""
        # The norm of an empty list is a 0 on the CPU, whatever the device of the others.
        return torch.stack([total_norm(layer).to(self._device) for layer in self._layers])

    def note(self, norms: torch.Tensor) -> None:
        """Add the norms of a step that the optimizer did not skip."""
        self._norms.append(norms)

    def moments(self, active_steps: Sequence[int]) -> GradientMoments:
        """Return the moments of all steps so far.

        Args:
            active_steps: number of steps in which each layer ran.
        """
        steps = np.maximum(np.asarray(active_steps, dtype=np.float64), 1)
        norms = torch.stack(self._norms or [torch.zeros(len(self._layers))]).double().cpu()
        return GradientMoments(
            norm=norms.sum(dim=0).numpy() / steps,
            square=norms.square().sum(dim=0).numpy() / steps,
        )


def total_norm(values: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the global norm of the gradients; parameters without a gradient are ignored."""
    gradients = [value.grad for value in values if value.grad is not None]
    return get_total_norm(gradients).detach()
