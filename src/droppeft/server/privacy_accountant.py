"""The (epsilon, delta) that a differentially private run has spent.

Source: Rényi differential privacy of the subsampled Gaussian mechanism (arXiv:1908.10530), computed
by Opacus. Neighbouring data sets differ in all rows of one client, which one of them lacks. Each
round releases the noisy sum of the changes of clients that were drawn independently with the same
probability.
"""

import warnings
from functools import cache

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.extras import require

MOST_NOISE = 1e4
"""Largest noise multiplier that is tried."""

STEPS = 1000
"""Noise multipliers are rounded up to one of so many values per unit."""

FIRST = 250
"""The noise multiplier that is tried first, in these steps."""


def epsilon_spent(config: Config, releases: int) -> float:
    """Return the epsilon that holds with the configured delta after some releases.

    Args:
        config: with a noise multiplier.
        releases: number of models that were released, one per round.

    Raises:
        DroppeftError: the package opacus is missing.
    """
    privacy = config.privacy
    assert privacy.noise_multiplier is not None
    assert privacy.delta is not None
    probability = config.cohort_size / config.clients
    return epsilon(privacy.noise_multiplier, probability, releases, privacy.delta)


@cache
def epsilon(noise_multiplier: float, probability: float, releases: int, delta: float) -> float:
    """Return the epsilon of subsampled Gaussian mechanisms.

    Args:
        noise_multiplier: standard deviation of the noise, relative to the clipping norm.
        probability: with which each client is drawn for a release.
        releases: number of releases.
        delta: probability with which epsilon may not hold.

    Raises:
        DroppeftError: the package opacus is missing.
    """
    if releases == 0:
        return 0.0
    require("privacy", "differential privacy")
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, probability, releases)]
    with warnings.catch_warnings(action="ignore"):  # about orders that are not the best
        return float(accountant.get_epsilon(delta))


def with_noise_multiplier(config: Config) -> Config:
    """Return the configuration with the noise multiplier with which it spends ``privacy.epsilon``.

    A configuration that has one, or that asks for no privacy, is returned as it is.

    Raises:
        DroppeftError: the noise multiplier and the rounds spend more than ``privacy.epsilon``, no
            noise suffices, or the package opacus is missing.
    """
    privacy = config.privacy
    if privacy.epsilon is None:
        return config
    if privacy.noise_multiplier is not None:
        check_budget(config, config.rounds)
        return config
    low, high = 0, FIRST
    while _spent_with(config, high) > privacy.epsilon:
        low, high = high, 2 * high
        if high / STEPS > MOST_NOISE:
            raise DroppeftError(
                f"privacy.epsilon={privacy.epsilon:g} needs more noise than {MOST_NOISE:g} times "
                "privacy.clip_norm; raise it"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if _spent_with(config, middle) <= privacy.epsilon else (middle, high)
        )
    return _with(config, high)


def check_budget(config: Config, releases: int) -> None:
    """Check that a run stays within its budget, if it has one.

    Args:
        config: with a noise multiplier.
        releases: number of models that all its rounds release.

    Raises:
        DroppeftError: it would spend more than ``privacy.epsilon``, or the package opacus is
            missing.
    """
    budget, spent = config.privacy.epsilon, epsilon_spent(config, releases)
    if budget is None or spent <= budget:
        return
    lost = releases - config.rounds
    repeated = f" and {lost} that had to be repeated" if lost else ""
    raise DroppeftError(
        f"rounds={config.rounds}{repeated} with privacy.noise_multiplier="
        f"{config.privacy.noise_multiplier:g} spend epsilon {spent:.3g}, which is more than "
        f"privacy.epsilon={budget:g}; run fewer rounds, or begin a new run"
    )


def _spent_with(config: Config, number: int) -> float:
    return epsilon_spent(_with(config, number), config.rounds)


def _with(config: Config, number: int) -> Config:
    privacy = config.privacy.model_copy(update={"noise_multiplier": number / STEPS})
    return config.model_copy(update={"privacy": privacy})
