"""What each layer of a model is worth, and the drop rates that follow from it. Ours.

:func:`droppeft.training.calibrating.calibrate` measures it.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.rates import ROUNDING, check_mean, weighted_rates

EXPENSIVE = 4
"""A layer is expensive if skipping it adds more than so many times the typical loss."""

NOISE = 2
"""A difference of fewer standard errors than this is taken to be noise."""


@dataclass(frozen=True)
class Calibration:
    """What each of the L layers of a model is worth, measured on a few rows.

    Losses are means over predictions (rows, or tokens of completions), in nats.

    Attributes:
        added_loss: (L,) loss when this layer alone is skipped, minus the loss of the full model. It
            says what dropping the layer costs. It may be negative.
        added_loss_error: (L,) standard error of each, over the rows.
        gradient: (L,) sum of the absolute gradients of the layer's adapter values (L1 norm). To
            first order, a step that moves every value by the learning rate, as Adam's first one
            does, lowers the loss by the rate times this sum. It says what training the layer
            brings, and thereby how deep a backward pass is worth its cost. 0 without an adapter. Of
            LoRA only B has a gradient at the start, since A is multiplied by B = 0.
        state_gradient: (L,) L2 norm of the gradient of the layer's output, the hidden states of all
            rows. It says whether the gradient vanishes or grows on its way to the lower layers; two
            layers with equal adapters may turn it into different ``gradient``. 0 below the lowest
            adapter.
        loss: of the full model.
        rows: number of rows on which all this was measured.
        targets: number of predictions in them.
        tokens: number of tokens in them.
        head_rows: number of further rows on which a new classification head was trained first; 0 if
            the model has a trained head, or none.
        calibration_wall_s: seconds that it took.
    """

    added_loss: tuple[float, ...]
    added_loss_error: tuple[float, ...]
    gradient: tuple[float, ...]
    state_gradient: tuple[float, ...]
    loss: float
    rows: int
    targets: int
    tokens: int
    head_rows: int
    calibration_wall_s: float

    @property
    def gradient_share(self) -> tuple[float, ...]:
        """(L,) ``gradient`` as a share of the sum over all layers; all 0 without gradients."""
        total = math.fsum(self.gradient)
        return tuple(one / total if total else 0.0 for one in self.gradient)

    @property
    def limit(self) -> float:
        """The added loss from which on a layer is expensive."""
        return EXPENSIVE * typical_loss(self.added_loss, self.added_loss_error)

    def rates(
        self, mean: float, *, first: int = 0, protected: Collection[int] = ()
    ) -> tuple[float, ...]:
        """Return the drop rates of the layers from ``first`` on; see :func:`calibrated_rates`.

        Args:
            mean: mean rate over these layers.
            first: number of lower layers that are left out.
            protected: indices of layers that are never dropped; 0 is the layer ``first``.
        """
        return calibrated_rates(
            mean, self.added_loss[first:], self.added_loss_error[first:], protected=protected
        )


def calibrated_rates(
    mean: float,
    added_loss: Sequence[float],
    error: Sequence[float] | None = None,
    *,
    protected: Collection[int] = (),
) -> tuple[float, ...]:
    """Distribute a mean drop rate over layers, so that those that cost least are dropped most.

    A layer's rate is proportional to 1 / added loss, where an added loss is taken to be at least a
    quarter of the typical one, and at least :data:`NOISE` standard errors. The typical one is the
    median over the layers. Expensive layers, which add more than :data:`EXPENSIVE` times the
    typical loss, are never dropped. If this makes the mean impossible, those of them that add least
    are dropped after all.

    Args:
        mean: mean rate over all L layers, in [0, 1]. Protected layers count as 0.
        added_loss: (L,) loss that is added when a layer alone is skipped, as ``droppeft calibrate``
            measures it.
        error: (L,) its standard errors; ``None`` if it is exact.
        protected: indices of layers that are never dropped, whatever they add.

    Returns:
        L probabilities of being dropped. Their sum is within 1e-9 of mean x L.

    Raises:
        DroppeftError: if there is not one error per layer, an added loss is not finite, or as in
            :func:`~droppeft.layer_dropout.weighted_rates`.
    """
    errors = [0.0] * len(added_loss) if error is None else error
    if len(errors) != len(added_loss):
        raise DroppeftError(
            f"{len(errors)} standard errors were given for {len(added_loss)} added losses; give "
            "one per layer"
        )
    for layer, added in enumerate(added_loss):
        if not math.isfinite(added):
            raise DroppeftError(f"the added loss of layer {layer} is {added}; it must be finite")
    check_mean(mean)
    typical = typical_loss(added_loss, errors)
    if typical <= 0:
        return weighted_rates(mean, (1.0,) * len(added_loss), protected=protected)
    floor = max(typical / EXPENSIVE, _noise(errors))
    expensive = expensive_layers(added_loss, errors) - {*protected}
    dropped = math.ceil(mean * len(added_loss) - ROUNDING)  # fewest layers that can be unprotected
    room = max(0, len(added_loss) - dropped - len({*protected}))
    kept = sorted(expensive, key=lambda layer: added_loss[layer], reverse=True)[:room]
    weights = [1 / max(added, floor) for added in added_loss]
    return weighted_rates(mean, weights, protected={*protected, *kept})


def expensive_layers(added_loss: Sequence[float], error: Sequence[float]) -> frozenset[int]:
    """Return the layers that add more than :data:`EXPENSIVE` times the typical loss."""
    typical = typical_loss(added_loss, error)
    if typical <= 0:
        return frozenset()
    return frozenset(layer for layer, added in enumerate(added_loss) if added > EXPENSIVE * typical)


def typical_loss(added_loss: Sequence[float], error: Sequence[float]) -> float:
    """Return the median added loss; at least what may be noise."""
    return max(median(added_loss), _noise(error)) if added_loss else 0.0


def _noise(error: Sequence[float]) -> float:
    return NOISE * median(error)
