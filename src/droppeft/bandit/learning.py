"""Estimate what arms are worth, from the rewards of a window of rounds. Ours.

The model is Bayesian linear regression:

    reward = level + effect of the round + value of the arm + noise

The prior of the level is so wide that the level is free; effects of rounds and values of arms have
the priors N(0, ROUNDS²) and N(0, PRIOR²). A reward is thus compared mainly with those of the same
round, and less with those of other rounds in the window, whose model was nearly the same. What all
arms have in common cannot be distinguished from the level, so that values are given as differences
from their mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

WINDOW = 20
"""Rounds after which a reward is forgotten."""

PRIOR, ROUND_SD = 1.0, 0.5
"""Prior standard deviations of an arm's value and of a round's effect, in units of the typical
reward."""

LEVEL_SD = 1e3
"""Prior standard deviation of the level."""

NOISE_PRIOR_COUNT = 4
"""Weight, in observations, of the prior that the noise is as large as the typical reward."""

FARTHEST = 5.0
"""Rewards are clipped to this multiple of their median size, which limits the effect of one
client."""

MIN_REWARD = 0.02
"""The smallest reward that an arm counts with, as a part of the typical reward. If no arm has a
larger one, the fastest arm is the best."""


@dataclass(frozen=True)
class Observation:
    """The reward of a local training that was merged.

    Attributes:
        round: round of the local training.
        arm: number of its arm.
        reward: its reward; the unit is the same for all observations in a window.
    """

    round: int
    arm: int
    reward: float


@dataclass(frozen=True)
class Estimate:
    """Estimated values of A arms, in units of the typical reward.

    Attributes:
        level: expected reward of an arm of mean value, mean over the rounds in the window; 1 if
            there are no observations.
        value: (A,) posterior means of the arms' values, minus their mean.
        covariance: (A, A) posterior covariance of these differences.
        noise: standard deviation of the noise.
        count: (A,) number of observations in the window.
    """

    level: float
    value: Vector
    covariance: Vector
    noise: float
    count: npt.NDArray[np.int64]

    @property
    def quality(self) -> Vector:
        """(A,) expected rewards."""
        return self.level + self.value

    @property
    def deviation(self) -> Vector:
        """(A,) posterior standard deviations of the values."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0))


def estimate(
    observations: Sequence[Observation], arms: Sequence[int], last: int, window: int
) -> Estimate:
    """Estimate the values of arms from the observations of the last rounds.

    Args:
        arms: numbers of the arms to estimate. Observations of other arms are used as well, since
            they tell about the level of their round.
        last: the newest round.
        window: number of rounds whose observations are used.
    """
    recent = [each for each in observations if last - window < each.round <= last]
    known = sorted({*arms, *(each.arm for each in recent)})
    rewards = np.array([each.reward for each in recent])
    typical = float(np.median(np.abs(rewards))) if len(recent) else 0.0
    rewards = np.clip(rewards, -FARTHEST * typical, FARTHEST * typical) if typical > 0 else rewards
    unit = float(np.sqrt(np.mean(rewards**2))) if len(recent) else 1.0
    rewards = rewards / unit if unit > 0 else rewards
    arm = _indicators([each.arm for each in recent], known)
    rounds = sorted({each.round for each in recent})
    round_ = _indicators([each.round for each in recent], rounds)
    design = np.hstack([np.ones((len(recent), 1)), round_, arm])
    prior = np.array([LEVEL_SD, *(ROUND_SD for _ in rounds), *(PRIOR for _ in known)])
    mean, covariance, noise = _posterior(design, rewards, prior)
    first_arm = 1 + len(rounds)
    chosen = [first_arm + known.index(number) for number in arms]
    common = float(mean[chosen].mean())
    differences = np.eye(len(chosen)) - 1 / len(chosen)
    level = float(mean[0] + mean[1:first_arm].mean()) + common if recent else 1.0
    return Estimate(
        level=level,
        value=mean[chosen] - common,
        covariance=differences @ covariance[np.ix_(chosen, chosen)] @ differences,
        noise=noise,
        count=np.array([sum(each.arm == number for each in recent) for number in arms], np.int64),
    )


def _indicators(values: Sequence[int], known: Sequence[int]) -> Vector:
    """(len(values), len(known)) 1 where value and known number are equal, 0 elsewhere."""
    same = np.array(values, int)[:, None] == np.array(known, int)[None, :]
    return np.asarray(same, np.float64)


def _posterior(design: Vector, rewards: Vector, prior: Vector) -> tuple[Vector, Vector, float]:
    """Posterior mean and covariance of the coefficients, and the standard deviation of the noise.

    The noise is that of the residuals, shrunk towards 1 (the typical reward). Since the posterior
    depends on it, both are computed in four iterations.
    """
    noise, inner = 1.0, design.T @ design
    for _ in range(4):
        covariance = np.linalg.inv(inner / noise**2 + np.diag(prior**-2)).astype(np.float64)
        mean = covariance @ (design.T @ rewards) / noise**2
        explained = float(np.trace(covariance @ inner)) / noise**2
        residual = float(np.sum((rewards - design @ mean) ** 2))
        noise = float(
            np.sqrt(
                (residual + NOISE_PRIOR_COUNT)
                / (max(0.0, len(rewards) - explained) + NOISE_PRIOR_COUNT)
            )
        )
    return mean, covariance, noise


def per_second(quality: Vector, seconds: Vector) -> Vector:
    """Reward per second, where a reward counts as at least :data:`MIN_REWARD`."""
    return np.maximum(quality, MIN_REWARD) / seconds
