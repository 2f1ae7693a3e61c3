"""Chooses the layers that are shared: those that score lowest.

Source: DropPEFT (arXiv:2503.10217); the hysteresis is ours.
"""

from collections.abc import Collection, Sequence


def count_of(fraction: float, layers: int) -> int:
    """Return a fraction of a number of layers, rounded to a whole number (halves up)."""
    return int(fraction * layers + 0.5)


def unchanged_shared(
    layers: Sequence[int], changed: Collection[int], before: Collection[int] | None
) -> frozenset[int]:
    """Return the shared layers that stay shared because they did not change.

    A layer that was not trained, or that ran in no step, stays shared or personal as it was. At
    first all layers are shared.

    Args:
        layers: the layers that have an adapter.
        changed: the layers that were trained and ran.
        before: the layers shared in the client's last participation; ``None`` before the first.
    """
    return frozenset(layer for layer in layers if before is None or layer in before) - {*changed}


def select_shared(
    scores: Sequence[float],
    changed: Sequence[int],
    count: int,
    before: Collection[int] | None,
    hysteresis: float,
) -> tuple[int, ...]:
    """Choose ``count`` of the changed layers to be shared; the others become personal.

    The first time, the layers with the lowest scores are shared; of equal scores, the lower layer.
    Later the choice begins with the layers that are shared already, and layers are added or removed
    by rank until there are ``count``. Then the shared layer with the highest score and the personal
    layer with the lowest score change places, as long as the first score exceeds the second by more
    than ``hysteresis`` times the absolute value of the second.

    Args:
        scores: one score per layer of the model.
        changed: the layers to choose from, in order.
        count: how many of them are shared, at most all.
        before: the layers shared last time, these or others; ``None`` the first time.
        hysteresis: 0 or more. With 0 the lowest scores are shared, but layers with equal scores do
            not change places.

    Returns:
        The shared layers, in order.
    """
    ranked = sorted(changed, key=lambda layer: (scores[layer], layer))
    if before is not None:
        ranked.sort(key=lambda layer: layer not in before)
    shared, personal = set(ranked[:count]), set(ranked[count:])
    while shared and personal:
        highest = max(shared, key=lambda layer: (scores[layer], layer))
        lowest = min(personal, key=lambda layer: (scores[layer], layer))
        if not scores[highest] - scores[lowest] > hysteresis * abs(scores[lowest]):
            break  # also if a score is not a number
        shared ^= {highest, lowest}
        personal ^= {highest, lowest}
    return tuple(sorted(shared))
