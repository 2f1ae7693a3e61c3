"""What arms are worth: gains of a window of rounds, each against the others of its round. Ours.

gain = level of the round + value of the arm + noise. Values have the prior N(0, PRIOR²), levels are
free; with noise of known size the values' posterior is normal (Bayesian linear regression, after
taking each round's mean out of both sides). What all arms have in common cannot be told from the
levels, so values are given less their mean, and their covariance without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

PRIOR = 0.5
"""Deviation of an arm's value before anything is known, in units of the typical gain."""

LEAST_NOISE = 0.05
"""The same units."""


@dataclass(frozen=True)
class Trial:
    """A turn that was merged.

    Attributes:
        round: of the turn.
        arm: number of the arm, which no other arm ever gets.
        gain: decrease of the loss on the device's validation rows.
    """

    round: int
    arm: int
    gain: float


@dataclass(frozen=True)
class Estimate:
    """Of some arms, in their order, in units of the typical gain.

    Attributes:
        level: mean gain of the window's turns, had their arms been worth the mean; 1 while there is
            no trial.
        value: (A,) posterior mean of the arms' values, less their mean.
        covariance: (A, A) of these differences.
        noise: deviation of a gain around its round's level and its arm's value.
        count: (A,) trials in the window.
    """

    level: float
    value: Vector
    covariance: Vector
    noise: float
    count: npt.NDArray[np.int64]

    @property
    def quality(self) -> Vector:
        """(A,) expected gain of a turn."""
        return self.level + self.value

    @property
    def deviation(self) -> Vector:
        """(A,) how far a value is known."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0))


def estimate(trials: Sequence[Trial], arms: Sequence[int], last: int, window: int) -> Estimate:
    """Estimate arms from the trials of the last rounds.

    Args:
        arms: numbers of those asked for; trials of others say something of their round's level.
        last: the newest round.
        window: so many rounds count.
    """
    recent = [trial for trial in trials if last - window < trial.round <= last]
    known = sorted({*arms, *(trial.arm for trial in recent)})
    place = {arm: index for index, arm in enumerate(known)}
    gains = np.array([trial.gain for trial in recent])
    unit = float(np.sqrt(np.mean(gains**2))) if len(recent) else 1.0
    gains = gains / unit if unit > 0 else gains
    design = np.zeros((len(recent), len(known)))
    design[np.arange(len(recent)), [place[trial.arm] for trial in recent]] = 1.0
    rounds = np.array([trial.round for trial in recent])
    inner, outer = _within(design, rounds), _within(gains[:, None], rounds)[:, 0]
    noise = _noise(inner, outer, len(set(rounds.tolist())))
    precision = inner.T @ inner / noise**2 + np.eye(len(known)) / PRIOR**2
    covariance = np.linalg.inv(precision).astype(np.float64)
    value = covariance @ inner.T @ outer / noise**2
    chosen = [place[arm] for arm in arms]
    common = float(value[chosen].mean())
    differences = np.eye(len(chosen)) - 1 / len(chosen)
    return Estimate(
        level=float((gains - design @ value).mean()) + common if len(recent) else 1.0,
        value=value[chosen] - common,
        covariance=differences @ covariance[np.ix_(chosen, chosen)] @ differences,
        noise=noise,
        count=design.sum(axis=0).astype(np.int64)[chosen],
    )


def _within(values: Vector, rounds: npt.NDArray[np.int64]) -> Vector:
    """Each row less its round's mean."""
    found = values.copy()
    for round in np.unique(rounds):
        own = rounds == round
        found[own] -= values[own].mean(axis=0)
    return found


def _noise(design: Vector, gains: Vector, rounds: int) -> float:
    """Deviation of what arms do not explain; 1, the typical gain, while little is known."""
    free = len(gains) - rounds - int(np.linalg.matrix_rank(design)) if len(gains) else 0
    if free < 2:
        return 1.0
    fitted = design @ np.linalg.lstsq(design, gains, rcond=None)[0]
    return max(LEAST_NOISE, float(np.sqrt(np.sum((gains - fitted) ** 2) / free)))
