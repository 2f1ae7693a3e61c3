"""How often layers are dropped, against how often they should be: chi-square tests at one level.

Correct code fails one of all these tests with probability 1e-6 at most, each time that somebody
chooses other seeds or another way to draw; with the seeds as they are it does not. Whoever checks
draws here also sees that a biased sampler is noticed.
"""

import itertools
import random
from collections.abc import Iterable, Sequence

import pytest
from scipy.stats import chi2

FALSE_ALARM = 1e-6
COMPARISONS = 1000
"""At most so many, among which the false alarm is divided (Bonferroni). There are about 400."""

DRAWS = 6000

Draws = Sequence[tuple[bool, ...]]

_numbers = itertools.count(1)


def largest(degrees: int = 1) -> float:
    """The chi-square statistic above which one of the comparisons fails."""
    assert next(_numbers) <= COMPARISONS, "raise COMPARISONS"
    return float(chi2.isf(FALSE_ALARM / COMPARISONS, df=degrees))


def assert_share(count: int, share: float, draws: int = DRAWS) -> None:
    """``count`` of so many independent draws, when it should be ``share`` of them."""
    if share in (0, 1):
        assert count == share * draws
    else:
        statistic = (count - draws * share) ** 2 / (draws * share * (1 - share))
        assert statistic < largest(), (count / draws, share)


def assert_rates(draws: Draws, rates: Sequence[float]) -> None:
    """Every layer is dropped as often as its rate says."""
    for layer, rate in enumerate(rates):
        assert_share(sum(not active[layer] for active in draws), rate, len(draws))


def assert_marginals(draws: Iterable[tuple[bool, ...]], rates: Sequence[float]) -> None:
    """The same, and a sampler that is a little off would have failed."""
    draws = list(draws)
    assert_rates(draws, rates)
    with pytest.raises(AssertionError):
        assert_rates(biased(draws), rates)


def biased(draws: Draws) -> Draws:
    """Every third draw drops a layer more, or, if none is left, one less."""
    rng = random.Random(1)
    worse = [list(active) for active in draws]
    for active in worse[::3]:
        running = [layer for layer, runs in enumerate(active) if runs]
        layer = rng.choice(running or range(len(active)))
        active[layer] = not active[layer]
    return [tuple(active) for active in worse]
