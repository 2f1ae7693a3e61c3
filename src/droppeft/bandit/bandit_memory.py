"""What the bandit remembers between rounds, and how it learns at the end of a round. Ours."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft.bandit.arms import Arm
from droppeft.bandit.learning import Estimate, Observation, estimate, per_second

SMOOTHING = 0.2
"""Weight of a round's importance in the running mean."""


@dataclass(frozen=True)
class BanditMemory:
    """What is known of the arms; a part of the server's state.

    Attributes:
        arms: those that may be given, by number; a number is never used twice.
        next_number: of the next new arm.
        observations: of the window's rounds.
        row_length: tokens of a row, padding included, mean of the last rounds.
        importance: of each layer, running mean; ``None`` before any is known.
        tried: numbers of the arms that some client was given, ever, merged or not.
        changed: the round after which arms were last taken out or exchanged.
    """

    arms: Mapping[int, Arm]
    next_number: int
    observations: tuple[Observation, ...]
    row_length: float
    importance: tuple[float, ...] | None
    tried: frozenset[int]
    changed: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the arms, in their order."""
        return tuple(self.arms)

    def known(self, window: int) -> Estimate:
        """Of the arms, in their order."""
        last = max((one.round for one in self.observations), default=0)
        return estimate(self.observations, self.numbers, last, window)


def begin(arms: Sequence[Arm], row_length: float) -> BanditMemory:
    """Nothing is known but the candidates."""
    return BanditMemory(dict(enumerate(arms)), len(arms), (), row_length, None, frozenset(), 0)


def with_round(
    memory: BanditMemory,
    observations: Sequence[Observation],
    round: int,
    window: int,
    row_length: float | None,
    importance: Sequence[float] | None,
    given: Collection[int] = (),
) -> BanditMemory:
    """Add what a round has shown; forget what is older than the window.

    Args:
        given: numbers of the arms that clients were given, besides those of the observations.
        row_length: mean of the round's turns, ``None`` if nothing was merged.
        importance: of each layer, mean over the round's turns in which it ran and was trained; 0
            where there was none. ``None`` if nothing was merged.
    """
    kept = [one for one in memory.observations if one.round > round - window]
    return replace(
        memory,
        observations=(*kept, *observations),
        tried=memory.tried | {one.arm for one in observations} | set(given),
        row_length=memory.row_length if row_length is None else row_length,
        importance=_smoothed(memory.importance, importance),
    )


def _smoothed(
    old: tuple[float, ...] | None, new: Sequence[float] | None
) -> tuple[float, ...] | None:
    if new is None or old is None:
        return old if new is None else tuple(new)
    return tuple(
        after if before == 0 else before if after == 0 else before + SMOOTHING * (after - before)
        for before, after in zip(old, new, strict=True)
    )


def halved(
    memory: BanditMemory,
    round: int,
    every: int,
    window: int,
    seconds: Sequence[float],
    suffice: Callable[[Collection[int]], bool] = lambda numbers: True,
) -> BanditMemory:
    """Take out the worse half, when a stage of so many rounds is over; the last arm stays.

    Arms that were not tried in the window are not judged, and stay.

    Args:
        seconds: what a turn takes with each arm, mean over the kinds of client.
        suffice: whether every kind of client can have one of these arms; what is needed stays.
    """
    if len(memory.arms) == 1 or round - memory.changed < every:
        return memory
    worth, count = _worth(memory, window, seconds), memory.known(window).count
    numbers = memory.numbers
    judged = [place for place in range(len(worth)) if count[place]]
    worst_first = sorted(judged, key=lambda place: worth[place])
    arms = dict(memory.arms)
    for place in worst_first[: len(judged) // 2]:
        if suffice(arms.keys() - {numbers[place]}):
            del arms[numbers[place]]
    return replace(memory, arms=arms, changed=round)


def refreshed(
    memory: BanditMemory,
    round: int,
    every: int,
    window: int,
    seconds: Sequence[float],
    near: Callable[[Arm], Sequence[Arm]],
    rng: np.random.Generator,
) -> BanditMemory:
    """Exchange the worst arm for a neighbour of the best, every so many rounds; 0 never.

    Arms that were not tried in the window are not judged.

    Args:
        near: neighbours of an arm, those that some client can have.
    """
    if every == 0 or round - memory.changed < every or len(memory.arms) < 2:
        return memory
    worth, tried = _worth(memory, window, seconds), memory.known(window).count > 0
    if not tried.any():
        return memory
    numbers = memory.numbers
    judged = [place for place in range(len(worth)) if tried[place]]
    best = max(judged, key=lambda place: worth[place])
    worst = min(judged, key=lambda place: worth[place])
    new = [arm for arm in near(memory.arms[numbers[best]]) if arm not in memory.arms.values()]
    if best == worst or not new:
        return replace(memory, changed=round)
    arms = {number: arm for number, arm in memory.arms.items() if number != numbers[worst]}
    arms[memory.next_number] = new[int(rng.integers(len(new)))]
    return replace(memory, arms=arms, next_number=memory.next_number + 1, changed=round)


def _worth(memory: BanditMemory, window: int, seconds: Sequence[float]) -> list[float]:
    return [float(one) for one in per_second(memory.known(window).quality, np.array(seconds))]
