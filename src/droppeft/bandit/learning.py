"""What arms are worth: rewards of a window of rounds, each against the level of its round. Ours.

reward = level + what is particular to the round + value of the arm + noise. The level is free;
rounds and arms have the priors N(0, ROUNDS²) and N(0, PRIOR²). With noise of known size the
posterior is normal (Bayesian linear regression). So a reward counts against those of its own round
first, and less against those of the rounds around it, whose model was nearly the same. What all
arms have in common cannot be told from the level, so values are given less their mean, and their
covariance without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

PRIOR, ROUNDS = 1.0, 0.5
"""Deviations of an arm's value, and of a round from the level, before anything is known; in units
of the typical reward."""

FREE = 1e3
"""The same of the level: as good as nothing is believed of it."""

BELIEF = 4
"""So many turns' worth of belief that a reward is as noisy as it is large."""

FARTHEST = 5.0
"""Rewards count for at most so many times the median size: one client's word moves no arm alone."""

LEAST = 0.02
"""Part of the typical reward that a turn counts for at least, so that time counts where no turn is
worth anything."""


@dataclass(frozen=True)
class Observation:
    """A turn that was merged.

    Attributes:
        round: of the turn.
        arm: number of the arm, which no other arm ever gets.
        reward: what it was worth, in any unit that the window's turns share.
    """

    round: int
    arm: int
    reward: float


@dataclass(frozen=True)
class Estimate:
    """Of some arms, in their order, in units of the typical reward.

    Attributes:
        level: mean reward of the window's turns, had their arms been worth the mean; 1 while there
            is no observation.
        value: (A,) posterior mean of the arms' values, less their mean.
        covariance: (A, A) of these differences.
        noise: deviation of a reward around its round's level and its arm's value.
        count: (A,) observations in the window.
    """

    level: float
    value: Vector
    covariance: Vector
    noise: float
    count: npt.NDArray[np.int64]

    @property
    def quality(self) -> Vector:
        """(A,) expected reward of a turn."""
        return self.level + self.value

    @property
    def deviation(self) -> Vector:
        """(A,) how far a value is known."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0))


def estimate(
    observations: Sequence[Observation], arms: Sequence[int], last: int, window: int
) -> Estimate:
    """Estimate arms from the observations of the last rounds.

    Args:
        arms: numbers of those asked for; observations of others say something of their round's
            level.
        last: the newest round.
        window: so many rounds count.
    """
    recent = [one for one in observations if last - window < one.round <= last]
    known = sorted({*arms, *(one.arm for one in recent)})
    rewards = np.array([one.reward for one in recent])
    typical = float(np.median(np.abs(rewards))) if len(recent) else 0.0
    rewards = np.clip(rewards, -FARTHEST * typical, FARTHEST * typical) if typical > 0 else rewards
    unit = float(np.sqrt(np.mean(rewards**2))) if len(recent) else 1.0
    rewards = rewards / unit if unit > 0 else rewards
    arm = _indicators([one.arm for one in recent], known)
    rounds = sorted({one.round for one in recent})
    round_ = _indicators([one.round for one in recent], rounds)
    design = np.hstack([np.ones((len(recent), 1)), round_, arm])
    prior = np.array([FREE, *(ROUNDS for _ in rounds), *(PRIOR for _ in known)])
    mean, covariance, noise = _posterior(design, rewards, prior)
    behind = 1 + len(rounds)
    chosen = [behind + known.index(number) for number in arms]
    common = float(mean[chosen].mean())
    differences = np.eye(len(chosen)) - 1 / len(chosen)
    level = float(mean[0] + mean[1:behind].mean()) + common if recent else 1.0
    return Estimate(
        level=level,
        value=mean[chosen] - common,
        covariance=differences @ covariance[np.ix_(chosen, chosen)] @ differences,
        noise=noise,
        count=np.array([sum(one.arm == number for one in recent) for number in arms], np.int64),
    )


def _indicators(values: Sequence[int], known: Sequence[int]) -> Vector:
    """(values, known) 1 where they are the same."""
    same = np.array(values, int)[:, None] == np.array(known, int)[None, :]
    return np.asarray(same, np.float64)


def _posterior(design: Vector, rewards: Vector, prior: Vector) -> tuple[Vector, Vector, float]:
    """Mean and covariance of the coefficients, and the noise that goes with them.

    The noise is what they do not explain, shrunk towards 1, the typical reward; as it decides how
    much they explain, a few turns are taken.
    """
    noise, inner = 1.0, design.T @ design
    for _ in range(4):
        covariance = np.linalg.inv(inner / noise**2 + np.diag(prior**-2)).astype(np.float64)
        mean = covariance @ (design.T @ rewards) / noise**2
        explained = float(np.trace(covariance @ inner)) / noise**2
        left = float(np.sum((rewards - design @ mean) ** 2))
        noise = float(np.sqrt((left + BELIEF) / (max(0.0, len(rewards) - explained) + BELIEF)))
    return mean, covariance, noise


def per_second(quality: Vector, seconds: Vector) -> Vector:
    """What arms are worth: reward per second, the least of a reward being :data:`LEAST`."""
    return np.maximum(quality, LEAST) / seconds
