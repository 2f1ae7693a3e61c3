"""Policies by name: from what is known of arms to what each device's next turn is hoped to gain.

``epsilon_greedy`` is the nearest to DropPEFT (arXiv:2503.10217), which names a bandit with
exploration and exploitation; ``sliding_window_ucb`` has the window of Garivier and Moulines
(arXiv:0805.3415) and the best arm with one challenger of Kalyanakrishnan et al. (LUCB, ICML 2012);
``budgeted_thompson`` is after Xia et al. (IJCAI 2015), the budget being seconds;
``successive_halving`` after Jamieson and Talwalkar (arXiv:1502.07943). All work on the estimate of
``learning.py``, which is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from droppeft.configurator.learning import Estimate, Vector

BONUS = 1.0
"""Of ``sliding_window_ucb``, in deviations per root of the logarithm of the trials."""

FORCED = 1e6
"""A score that no gain reaches: this device tries this arm."""


@dataclass(frozen=True)
class Scored:
    """What a policy hopes of every arm on every device.

    Attributes:
        scores: (devices, A) expected gain, or :data:`FORCED` in one place of a row.
        by_cost: whether seconds count; otherwise the best score is taken whatever it takes.
    """

    scores: Vector
    by_cost: bool = True


@dataclass(frozen=True)
class Asked:
    """What a policy may need besides an estimate.

    Attributes:
        seconds: (A,) of a turn with each arm, mean over the kinds of device.
        epsilon: part of the turns that explore.
        rng: of this round.
    """

    seconds: Vector
    epsilon: float
    rng: np.random.Generator


Policy = Callable[[Estimate, int, Asked], Scored]
"""(estimate, devices, what else) to scores."""


def _random(known: Estimate, devices: int, asked: Asked) -> Scored:
    return Scored(asked.rng.random((devices, len(known.value))), by_cost=False)


def _greedy(known: Estimate, devices: int, asked: Asked) -> Scored:
    scores = np.tile(known.quality, (devices, 1))
    explores = asked.rng.random(devices) < asked.epsilon
    arms = asked.rng.integers(len(known.value), size=devices)
    scores[explores, arms[explores]] = FORCED
    return Scored(scores)


def _ucb(known: Estimate, devices: int, asked: Asked) -> Scored:
    """All but one device have the best arm; one tries that of the others with the highest bound.

    A gain counts against those of its round, so a round in which all do the same shows nothing.
    When no bound is above what is expected of the best arm, nobody tries others.
    """
    scores = np.tile(known.quality, (devices, 1))
    bonus = BONUS * np.sqrt(np.log(max(2, known.count.sum()))) * known.deviation
    worth, bound = known.quality / asked.seconds, (known.quality + bonus) / asked.seconds
    best = int(worth.argmax())
    bound[best] = -np.inf
    if bound.max() > worth[best]:
        scores[asked.rng.integers(devices), int(bound.argmax())] = FORCED
    return Scored(scores)


def _thompson(known: Estimate, devices: int, asked: Asked) -> Scored:
    drawn = asked.rng.multivariate_normal(
        known.value, known.covariance, size=devices, method="eigh"
    )
    return Scored(known.level + drawn)


def _in_turn(known: Estimate, devices: int, asked: Asked) -> Scored:
    """Those that were tried least are next; the best by cost when one is left."""
    arms = len(known.value)
    if arms == 1:
        return Scored(np.tile(known.quality, (devices, 1)))
    tried = known.count.astype(float) + asked.rng.random(arms) / 2
    scores = np.tile(known.quality, (devices, 1))
    for device in range(devices):
        next_arm = int(np.argmin(tried))
        scores[device, next_arm] = FORCED
        tried[next_arm] += 1
    return Scored(scores)


POLICIES: dict[str, Policy] = {
    "uniform_random": _random,
    "epsilon_greedy": _greedy,
    "sliding_window_ucb": _ucb,
    "budgeted_thompson": _thompson,
    "successive_halving": _in_turn,
}
"""All but ``fixed``, which asks nobody. Halving itself is in ``memory.py``: it forgets arms."""
