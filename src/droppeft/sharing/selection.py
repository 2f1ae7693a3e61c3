"""From scores of layers to the ones that are shared: those that score lowest. Source: METHOD 4."""

from collections.abc import Collection, Sequence


def count_of(fraction: float, layers: int) -> int:
    """How many of some layers a part of them is; halves are rounded up."""
    return int(fraction * layers + 0.5)


def unmoved(
    layers: Sequence[int], moved: Collection[int], before: Collection[int] | None
) -> frozenset[int]:
    """Layers that stay shared because the turn did not move them.

    There is no choice about a layer that was not trained or that no step ran: it stays what it is,
    and every layer begins as shared.

    Args:
        layers: that have an adapter.
        moved: those that the turn trained and ran.
        before: shared after the client's last turn that counted; ``None`` before its first.
    """
    return frozenset(layer for layer in layers if before is None or layer in before) - {*moved}


def select_shared(
    scores: Sequence[float],
    moved: Sequence[int],
    count: int,
    before: Collection[int] | None,
    hysteresis: float,
) -> tuple[int, ...]:
    """Choose ``count`` of the layers to be shared; the others, which score higher, are kept.

    Before the first turn that is the ranking; equal scores: the lower layer is shared. Later it
    begins with the layers that are shared already, by rank fewer or more if they are not ``count``;
    then a shared and a kept layer change places while the first scores above the second by more
    than ``hysteresis`` times the size of that one's score.

    Args:
        scores: one per layer of the model.
        moved: the layers that there is a choice about, in order.
        count: how many of them are shared, at most all.
        before: which were shared last time, of these or others; ``None`` before the first time.
        hysteresis: 0 or more; with 0 the choice ranks, but equal scores change no places.
    """
    ranked = sorted(moved, key=lambda layer: (scores[layer], layer))
    if before is not None:
        ranked.sort(key=lambda layer: layer not in before)
    shared, kept = set(ranked[:count]), set(ranked[count:])
    while shared and kept:
        highest = max(shared, key=lambda layer: (scores[layer], layer))
        lowest = min(kept, key=lambda layer: (scores[layer], layer))
        if not scores[highest] - scores[lowest] > hysteresis * abs(scores[lowest]):
            break  # also where a score is no number
        shared ^= {highest, lowest}
        kept ^= {highest, lowest}
    return tuple(sorted(shared))
