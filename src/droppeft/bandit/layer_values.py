"""What training a layer is worth, estimated from the updates of each round. Ours.

An arm's reward is the sum of what it does for each layer that it trains. So a local training tells
about every arm that trains some of the same layers, and arms need not be tried one by one: this is
a combinatorial bandit with a reward for each component (semi-bandit feedback; Chen et al., ICML
2013).

The value of a layer in a round is

    mean norm of its gradient  x  how far its changes point in the same direction

where the second factor is the mean cosine of a client's change of the layer with the mean change of
the other clients that trained it, at least 0. AdamW moves all layers by about the same distance, so
that the decrease of the loss is, to first order, the distance times the norm of the common part of
the gradient. The norm that a client reports also contains the noise of its batches and of its own
data, which the cosine discounts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np
import numpy.typing as npt

from droppeft.messages.tensors import LayerKey

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Changes = Mapping[tuple[LayerKey, str], Matrix]

FORGET = 0.3
"""Weight of a round's values in the running mean."""

LARGEST_NORM = 3.0
"""The most that one client's norm of a layer counts, as a multiple of the median, so that a single
client cannot decide what layers are worth."""

LEAST = 0.1
"""The smallest mean with which layers enter a round, so that worthless ones can become worth
something again."""


@dataclass(frozen=True)
class LayerValues:
    """Estimated values of L layers per step in which they are trained, up to a common factor.

    Attributes:
        values: of each layer; their mean over all layers is 1. Only ratios matter.
        rounds: of each layer, in how many rounds it was observed.
    """

    values: tuple[float, ...]
    rounds: tuple[int, ...]

    @classmethod
    def unknown(cls, num_layers: int) -> "LayerValues":
        """All layers are worth the same."""
        return cls((1.0,) * num_layers, (0,) * num_layers)

    def of(self, trained: Sequence[float]) -> float:
        """Expected value of a step, relative to one that trains all layers.

        Args:
            trained: of each layer, the probability that the step trains it.
        """
        total = sum(self.values)
        return sum(p * value for p, value in zip(trained, self.values, strict=True)) / total

    def after(self, observed: Mapping[int, float]) -> "LayerValues":
        """The values after a round.

        Args:
            observed: by layer that at least two clients trained in the round, its value, in a unit
                of the round's own.
        """
        unit = float(np.mean(list(observed.values()))) if observed else 0.0
        if not unit > 0:
            return self
        # The observed layers keep the mean that they had together, so that rounds in which some
        # layers were not observed do not change the others relative to them.
        before = max(LEAST, float(np.mean([self.values[layer] for layer in observed])))
        values, rounds = list(self.values), list(self.rounds)
        for layer, value in observed.items():
            weight = max(FORGET, 1 / (1 + rounds[layer]))
            values[layer] += weight * (value / unit * before - values[layer])
            rounds[layer] += 1
        mean = float(np.mean(values))
        return LayerValues(tuple(value / mean for value in values), tuple(rounds))


def observed_values(
    changes: Sequence[Changes], importance: Sequence[Sequence[float]], weights: Sequence[float]
) -> dict[int, float]:
    """The values of the layers that at least two updates of a round changed.

    Args:
        changes: by update, the change of each tensor.
        importance: by update, the mean norm of each layer's gradient over the steps that trained
            it; 0 for a layer that it did not train.
        weights: weight of each update in the mean.
    """
    by_layer: dict[int, list[tuple[int, Vector]]] = {}
    for number, change in enumerate(changes):
        parts: dict[int, list[Vector]] = {}
        for (key, _), moved in sorted(change.items(), key=lambda item: str(item[0])):
            if isinstance(key, int):
                parts.setdefault(key, []).append(moved.ravel())
        for layer, pieces in parts.items():
            if importance[number][layer] > 0:
                by_layer.setdefault(layer, []).append((number, np.concatenate(pieces)))
    return {
        layer: _norm(layer, found, importance) * _agreement(found, weights)
        for layer, found in sorted(by_layer.items())
        if len(found) > 1
    }


def _norm(
    layer: int, found: Sequence[tuple[int, Vector]], importance: Sequence[Sequence[float]]
) -> float:
    norms = [importance[number][layer] for number, _ in found]
    return float(np.minimum(norms, LARGEST_NORM * median_low(norms)).mean())


def _agreement(found: Sequence[tuple[int, Vector]], weights: Sequence[float]) -> float:
    """Mean cosine of each change with the weighted mean of the others, at least 0."""
    total = sum(weights[number] * change for number, change in found)
    cosines = []
    for number, change in found:
        others = total - weights[number] * change
        scale = float(np.linalg.norm(change) * np.linalg.norm(others))
        cosines.append(float(change @ others) / scale if scale > 0 else 0.0)
    return max(0.0, float(np.mean(cosines)))
