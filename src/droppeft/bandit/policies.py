"""Policies by name: from what is known of arms to the rewards hoped for in the next round.

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
import numpy.typing as npt

from droppeft.bandit.learning import Estimate, Vector, per_second

Flags = npt.NDArray[np.bool_]

BONUS = 1.0
"""Of ``sliding_window_ucb``, in deviations per root of the logarithm of the observations."""

LOT = "uniform_random"
"""The policy that learns nothing."""

FORCED = 1e6
"""A score that no reward reaches: this client tries this arm."""


@dataclass(frozen=True)
class ScoredArms:
    """What a policy hopes of every arm on every client.

    Attributes:
        scores: (clients, A) expected reward, or :data:`FORCED` in one place of a row.
        expected: (A,) what is expected of an arm, also where it is forced.
        by_cost: whether seconds count; otherwise the best score is taken whatever it takes.
    """

    scores: Vector
    expected: Vector
    by_cost: bool = True


@dataclass(frozen=True)
class Asked:
    """What a policy may need besides an estimate.

    Attributes:
        seconds: (clients, A) of a turn.
        fits: (clients, A) whether the client may have the arm.
        untried: (A,) whether no client was ever given the arm.
        epsilon: part of the turns that explore.
        rng: of this round.
    """

    seconds: Vector
    fits: Flags
    untried: Flags
    epsilon: float
    rng: np.random.Generator

    @property
    def clients(self) -> int:
        """Of the round."""
        return len(self.seconds)


Policy = Callable[[Estimate, Asked], ScoredArms]


def score(policy: str, known: Estimate, asked: Asked) -> ScoredArms:
    """What a policy hopes; one that learns tries every arm once before it believes anything.

    As many clients as there are untried arms get one each, the longest arms the fastest clients.

    Args:
        policy: a key of :data:`POLICIES`.
    """
    found = POLICIES[policy](known, asked)
    if policy != LOT:
        fastest = np.argsort(asked.seconds.mean(axis=1), kind="stable").tolist()
        longest = np.argsort(-asked.seconds.mean(axis=0), kind="stable").tolist()
        for arm in (arm for arm in longest if asked.untried[arm]):
            client = next((one for one in fastest if asked.fits[one, arm]), None)
            if client is not None:
                fastest.remove(client)
                found.scores[client] = known.quality
                found.scores[client, arm] = FORCED
    return found


def _random(known: Estimate, asked: Asked) -> ScoredArms:
    scores = asked.rng.random((asked.clients, len(known.value)))
    return ScoredArms(scores, known.quality, by_cost=False)


def _greedy(known: Estimate, asked: Asked) -> ScoredArms:
    scores = np.tile(known.quality, (asked.clients, 1))
    for client in np.flatnonzero(asked.rng.random(asked.clients) < asked.epsilon):
        able = np.flatnonzero(asked.fits[client])
        if len(able):
            scores[client, asked.rng.choice(able)] = FORCED
    return ScoredArms(scores, known.quality)


def _ucb(known: Estimate, asked: Asked) -> ScoredArms:
    """All but one client have the best arm; one tries that of the others with the highest bound.

    A reward counts against those of its round, so a round in which all do the same shows nothing.
    When no bound is above what is expected of the best arm, nobody tries others.
    """
    scores = np.tile(known.quality, (asked.clients, 1))
    seconds = asked.seconds.mean(axis=0)
    bonus = BONUS * np.sqrt(np.log(max(2, known.count.sum()))) * known.deviation
    possible = asked.fits.any(axis=0)
    worth = np.where(possible, per_second(known.quality, seconds), -np.inf)
    bound = np.where(possible, per_second(known.quality + bonus, seconds), -np.inf)
    best = int(worth.argmax())
    bound[best] = -np.inf
    challenger = int(bound.argmax())
    if bound[challenger] > worth[best]:
        able = np.flatnonzero(asked.fits[:, challenger])
        scores[asked.rng.choice(able), challenger] = FORCED
    return ScoredArms(scores, known.quality)


def _thompson(known: Estimate, asked: Asked) -> ScoredArms:
    drawn = asked.rng.multivariate_normal(
        known.value, known.covariance, size=asked.clients, method="eigh"
    )
    return ScoredArms(known.level + drawn, known.quality)


def _in_turn(known: Estimate, asked: Asked) -> ScoredArms:
    """Those that were tried least are next; a client that can have one alone has that."""
    scores = np.tile(known.quality, (asked.clients, 1))
    tried = known.count.astype(float) + asked.rng.random(len(known.value)) / 2
    for client in range(asked.clients):
        if asked.fits[client].sum() > 1:
            able = np.where(asked.fits[client], tried, np.inf)
            scores[client, int(able.argmin())] = FORCED
            tried[int(able.argmin())] += 1
    return ScoredArms(scores, known.quality)


POLICIES: dict[str, Policy] = {
    LOT: _random,
    "epsilon_greedy": _greedy,
    "sliding_window_ucb": _ucb,
    "budgeted_thompson": _thompson,
    "successive_halving": _in_turn,
}
"""All but ``fixed``, which asks nobody. Halving itself is in ``memory.py``: it forgets arms."""
