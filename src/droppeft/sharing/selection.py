"""From scores of layers to the ones that are shared: those that score lowest. Source: METHOD 4."""

from collections.abc import Sequence


def count_of(fraction: float, layers: int) -> int:
    """How many of some layers a part of them is; halves are rounded up."""
    return int(fraction * layers + 0.5)


def select_shared(
    scores: Sequence[float],
    layers: Sequence[int],
    count: int,
    before: Sequence[int] | None,
    hysteresis: float,
) -> tuple[int, ...]:
    """Choose ``count`` of the layers to be shared; the others, which score higher, are kept.

    Without an earlier choice, or from one of another size, that is the ranking; equal scores: the
    lower layer is shared. Otherwise a shared layer and a kept one change places while its score is
    above the kept one's by more than ``hysteresis`` times that one's absolute value.

    Args:
        scores: one per layer of the model.
        layers: those that there is a choice about, in order.
        count: how many are shared, at most all.
        before: which of them were shared last time.
        hysteresis: 0 or more; with 0 the choice ranks, but equal scores change no places.
    """
    ranked = sorted(layers, key=lambda layer: (scores[layer], layer))
    shared = set(before if before is not None and len(before) == count else ranked[:count])
    kept = set(layers) - shared
    while shared and kept:
        highest = max(shared, key=lambda layer: (scores[layer], layer))
        lowest = min(kept, key=lambda layer: (scores[layer], layer))
        if scores[highest] - scores[lowest] <= hysteresis * abs(scores[lowest]):
            break
        shared ^= {highest, lowest}
        kept ^= {highest, lowest}
    return tuple(sorted(shared))
