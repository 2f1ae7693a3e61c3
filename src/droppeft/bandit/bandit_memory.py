"""What the bandit remembers between rounds, and how it learns at the end of a round. Ours."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft.bandit.arms import Arm
from droppeft.bandit.learning import Estimate, Observation, estimate, per_second

SMOOTHING = 0.2
"""Weight of the newest round in the running mean of the importance."""


@dataclass(frozen=True)
class BanditMemory:
    """What the bandit knows; a part of the server's state.

    Attributes:
        arms: the current arms by number; a number is never used twice.
        next_number: number of the next new arm.
        observations: observations of the rounds in the window.
        row_length: mean tokens per row in the last round with updates, padding included.
        importance: running mean of the importance of each layer; ``None`` before the first.
        tried: numbers of all arms that were ever given to a client, whether merged or not.
        changed: the round after which arms were last removed or replaced.
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
        """Numbers of the current arms, in order."""
        return tuple(self.arms)

    def known(self, window: int) -> Estimate:
        """Estimate of the current arms, in order."""
        last = max((observation.round for observation in self.observations), default=0)
        return estimate(self.observations, self.numbers, last, window)


def begin(arms: Sequence[Arm], row_length: float) -> BanditMemory:
    """The memory before the first round: the candidates, and no observations."""
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
    """Add the results of a round, and forget observations that are older than the window.

    Args:
        row_length: mean tokens per row in the round, ``None`` if nothing was merged.
        importance: importance of each layer, mean over the updates that ran and trained it; 0 if
            none did. ``None`` if nothing was merged.
        given: numbers of the arms that clients were given, besides those of the observations.
    """
    recent = [
        observation for observation in memory.observations if observation.round > round - window
    ]
    return replace(
        memory,
        observations=(*recent, *observations),
        tried=memory.tried | {observation.arm for observation in observations} | set(given),
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
    """Remove the worse half of the arms after a stage of ``every`` rounds; one arm always stays.

    Arms without observations in the window stay.

    Args:
        seconds: modelled seconds of a local training with each arm, mean over the device profiles.
        suffice: whether each device profile fits one of these arms; an arm that is needed for this
            stays.
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
    """Replace the worst arm by a neighbour of the best, after ``every`` rounds; never if it is 0.

    Arms without observations in the window count as neither best nor worst.

    Args:
        seconds: modelled seconds of a local training with each arm, mean over the device profiles.
        near: returns the neighbours of an arm that fit some device profile.
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
    return [float(worth) for worth in per_second(memory.known(window).quality, np.array(seconds))]
