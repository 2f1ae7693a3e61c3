"""Chi-square tests of how often layers are dropped.

With new seeds, correct code fails any of these tests with probability 1e-6 at most; with the given
seeds it passes. The tests also check that a biased sampler would fail.
"""

import itertools
import math
import random
from collections.abc import Iterable, Sequence

import pytest
from scipy.stats import chi2

FALSE_ALARM = 1e-6
COMPARISONS = 1000
"""Largest number of comparisons, by which the level is divided (Bonferroni); about 400 exist."""

DRAWS = 6000

Draws = Sequence[tuple[bool, ...]]

_numbers = itertools.count(1)


def largest(degrees: int = 1) -> float:
    """Return the chi-square statistic above which a comparison fails."""
    assert next(_numbers) <= COMPARISONS, "raise COMPARISONS"
    return float(chi2.isf(FALSE_ALARM / COMPARISONS, df=degrees))


def assert_share(count: int, share: float, draws: int = DRAWS) -> None:
    """Check that ``count`` of independent draws is compatible with a probability of ``share``."""
    if share in (0, 1):
        assert count == share * draws
    else:
        statistic = (count - draws * share) ** 2 / (draws * share * (1 - share))
        assert statistic < largest(), (count / draws, share)


def assert_rates(draws: Draws, rates: Sequence[float]) -> None:
    """Check that every layer is dropped at its rate."""
    for layer, rate in enumerate(rates):
        assert_share(sum(not active[layer] for active in draws), rate, len(draws))


def assert_marginals(draws: Iterable[tuple[bool, ...]], rates: Sequence[float]) -> None:
    """Check the rates, and that a slightly biased sampler would fail."""
    draws = list(draws)
    assert_rates(draws, rates)
    with pytest.raises(AssertionError):
        assert_rates(biased(draws), rates)


def conditioned(rates: Sequence[float], needed: Sequence[int]) -> tuple[float, ...]:
    """Return the rates of independent gates that are drawn again until a needed layer runs.

    By Bayes' rule, where p is the probability that one draw drops all needed layers.
    """
    p = math.prod(rates[layer] for layer in needed)
    return tuple((r - p) / (1 - p) if i in needed else r for i, r in enumerate(rates))


def biased(draws: Draws) -> Draws:
    """Return draws of which every third drops one layer more, or less if all are dropped."""
    rng = random.Random(1)
    worse = [list(active) for active in draws]
    for active in worse[::3]:
        running = [layer for layer, runs in enumerate(active) if runs]
        layer = rng.choice(running or range(len(active)))
        active[layer] = not active[layer]
    return [tuple(active) for active in worse]
