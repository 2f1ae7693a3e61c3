"""Policies by name: from the estimated values of arms to scores for the next round.

- ``epsilon_greedy`` is the nearest to DropPEFT (arXiv:2503.10217), whose bandit explores and
  exploits.
- ``sliding_window_ucb`` uses the sliding window of Garivier and Moulines (arXiv:0805.3415), and the
  best arm with one challenger of Kalyanakrishnan et al. (LUCB, ICML 2012).
- ``budgeted_thompson`` follows Xia et al. (IJCAI 2015), with seconds as the budget.

All of them work on the estimate of ``learning.py``, which is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from droppeft.bandit.learning import Estimate, Vector, per_second

Flags = npt.NDArray[np.bool_]

EPSILON = 0.2
"""Of ``epsilon_greedy``: the share of local trainings that explore."""

BONUS = 1.0
"""Of ``sliding_window_ucb``: the bound adds this many deviations, times √ln(observations)."""

RANDOM = "uniform_random"
"""The policy that learns nothing."""

LAYER_VALUES = "layer_values"
"""The policy that chooses by what layers are worth, without trying arms; see
:mod:`droppeft.bandit.layer_values`."""

FORCED = 1e6
"""A score above any reward: the client is forced to take this arm."""


@dataclass(frozen=True)
class ScoredArms:
    """A policy's scores of A arms for each client.

    Attributes:
        scores: (clients, A) scores in the unit of rewards; :data:`FORCED` in at most one place of a
            row.
        expected: (A,) expected rewards, also of forced arms.
        by_cost: whether scores are compared per second; otherwise the best score is taken, however
            long its arm takes.
    """

    scores: Vector
    expected: Vector
    by_cost: bool = True


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy may use besides the estimate.

    Attributes:
        seconds: (clients, A) modelled seconds of a local training.
        fits: (clients, A) whether the arm fits the client.
        untried: (A,) whether the arm was never given to any client.
        rng: random generator of this round.
    """

    seconds: Vector
    fits: Flags
    untried: Flags
    rng: np.random.Generator

    @property
    def clients(self) -> int:
        """Number of clients in the round's cohort."""
        return len(self.seconds)


Policy = Callable[[Estimate, PolicyInputs], ScoredArms]


def score(policy: str, known: Estimate, inputs: PolicyInputs) -> ScoredArms:
    """A policy's scores, where policies that learn first try every arm once.

    Each untried arm is forced on one client, as far as there are clients: the slowest arm on the
    fastest client that it fits, and so on.

    Args:
        policy: a key of :data:`POLICIES`.
    """
    scored = POLICIES[policy](known, inputs)
    if policy != RANDOM:
        fastest = np.argsort(inputs.seconds.mean(axis=1), kind="stable").tolist()
        longest = np.argsort(-inputs.seconds.mean(axis=0), kind="stable").tolist()
        for arm in (arm for arm in longest if inputs.untried[arm]):
            client = next((client for client in fastest if inputs.fits[client, arm]), None)
            if client is not None:
                fastest.remove(client)
                scored.scores[client] = known.quality
                scored.scores[client, arm] = FORCED
    return scored


def _random(known: Estimate, inputs: PolicyInputs) -> ScoredArms:
    scores = inputs.rng.random((inputs.clients, len(known.value)))
    return ScoredArms(scores, known.quality, by_cost=False)


def _greedy(known: Estimate, inputs: PolicyInputs) -> ScoredArms:
    scores = np.tile(known.quality, (inputs.clients, 1))
    for client in np.flatnonzero(inputs.rng.random(inputs.clients) < EPSILON):
        able = np.flatnonzero(inputs.fits[client])
        if len(able):
            scores[client, inputs.rng.choice(able)] = FORCED
    return ScoredArms(scores, known.quality)


def _ucb(known: Estimate, inputs: PolicyInputs) -> ScoredArms:
    """One random client tries the challenger: the other arm with the highest bound per second.

    All other clients use the expected rewards. Rewards are compared within a round, so that a round
    in which all clients had the same arm would teach nothing. If no bound is above the expected
    reward per second of the best arm, no client tries another one.
    """
    scores = np.tile(known.quality, (inputs.clients, 1))
    seconds = inputs.seconds.mean(axis=0)
    bonus = BONUS * np.sqrt(np.log(max(2, known.count.sum()))) * known.deviation
    possible = inputs.fits.any(axis=0)
    worth = np.where(possible, per_second(known.quality, seconds), -np.inf)
    bound = np.where(possible, per_second(known.quality + bonus, seconds), -np.inf)
    best = int(worth.argmax())
    bound[best] = -np.inf
    challenger = int(bound.argmax())
    if bound[challenger] > worth[best]:
        able = np.flatnonzero(inputs.fits[:, challenger])
        scores[inputs.rng.choice(able), challenger] = FORCED
    return ScoredArms(scores, known.quality)


def _thompson(known: Estimate, inputs: PolicyInputs) -> ScoredArms:
    drawn = inputs.rng.multivariate_normal(
        known.value, known.covariance, size=inputs.clients, method="eigh"
    )
    return ScoredArms(known.level + drawn, known.quality)


POLICIES: dict[str, Policy] = {
    RANDOM: _random,
    "epsilon_greedy": _greedy,
    "sliding_window_ucb": _ucb,
    "budgeted_thompson": _thompson,
}
"""All policies that estimate arms."""
