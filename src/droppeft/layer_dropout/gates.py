"""Which layers run in one step: gates drawn from the layers' drop rates.

Source: independent gates per layer and mini-batch are DropPEFT's (arXiv:2503.10217). Exact counts
are ours; they are drawn by randomised systematic sampling (Madow 1949; Goodman and Kish 1950).
"""

import math
import random
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.rates import explicit_rates

# Exact gates count in multiples of 2^-40: integers add up exactly, so a sum such as 6 x (1/3)
# cannot turn into 1.9999999999999998 and yield one layer too few or too many.
_ONE = 1 << 40
_ROUNDING = 1e-9

# Gates are redrawn until a needed layer is active, which takes 1 / (1 - rate) draws on average.
_LARGEST_NEEDED_RATE = 0.999


class Sampling(NamedTuple):
    """One way to draw gates.

    Attributes:
        draw: (L rates, generator) to L gates, True for a layer that runs.
        all_dropped: (L rates, layers) to the probability that one draw drops all those layers.
    """

    draw: Callable[[Sequence[float], random.Random], tuple[bool, ...]]
    all_dropped: Callable[[Sequence[float], frozenset[int]], float]


def _draw_bernoulli(rates: Sequence[float], rng: random.Random) -> tuple[bool, ...]:
    # random() lies in [0, 1): rate 0 is never dropped and rate 1 always.
    return tuple(rng.random() >= rate for rate in rates)


def _all_dropped_bernoulli(rates: Sequence[float], layers: frozenset[int]) -> float:
    return math.prod(rates[layer] for layer in layers)


def _draw_exact(rates: Sequence[float], rng: random.Random) -> tuple[bool, ...]:
    """Lay the rates end to end in random order and drop where a comb with teeth 1 apart falls.

    The comb's offset is uniform, so a layer is hit with probability equal to its length whatever
    the order; the order is random so that no two layers are tied to each other.
    """
    units = _integer_rates(rates)
    order = list(range(len(units)))
    rng.shuffle(order)
    offset = rng.randrange(_ONE)
    ends = accumulate((units[layer] for layer in order), initial=offset)
    active = [True] * len(units)
    for layer, (start, end) in zip(order, pairwise(ends), strict=True):
        active[layer] = start // _ONE == end // _ONE
    return tuple(active)


def _integer_rates(rates: Sequence[float]) -> list[int]:
    """Rates as multiples of 2^-40, with a whole total where the rates' sum is meant to be whole."""
    units = [round(rate * _ONE) for rate in rates]
    total = math.fsum(rates)
    if abs(total - round(total)) > _ROUNDING:
        return units
    missing = round(total) * _ONE - sum(units)
    for layer, unit in enumerate(units):
        if 0 < unit < _ONE:
            units[layer] = min(max(unit + missing, 0), _ONE)
            missing -= units[layer] - unit
    return units


def _all_dropped_exact(rates: Sequence[float], layers: frozenset[int]) -> float:
    others = [rate for layer, rate in enumerate(rates) if layer not in layers]
    needed = [rates[layer] for layer in layers]
    most = math.ceil(math.fsum(rates) - _ROUNDING) - others.count(1.0)
    if most < len(layers) or 0.0 in needed:
        return 0.0
    if any(0 < rate < 1 for rate in others):
        raise DroppeftError(
            "exact gates have no closed form for conditioned rates when layers outside "
            "need_one_of are dropped at random too; draw gates and count, or use bernoulli"
        )
    # Only when the larger of the two counts is drawn are all of them dropped.
    return math.fsum(needed) - (len(layers) - 1)


SAMPLINGS: dict[str, Sampling] = {
    "exact": Sampling(_draw_exact, _all_dropped_exact),
    "bernoulli": Sampling(_draw_bernoulli, _all_dropped_bernoulli),
}
"""Sampling by name. Both drop layer l with probability r_l.

``exact``: the number of dropped layers is the rates' sum, or one of its two whole neighbours;
rates are rounded to 2^-40 and a sum within 1e-9 of a whole number counts as whole.
``bernoulli``: independent gates, so the number varies.
"""


def sample_active(
    rates: Sequence[float],
    sampling: str,
    rng: random.Random,
    *,
    need_one_of: Collection[int] = (),
) -> tuple[bool, ...]:
    """Draw the gates of one step.

    Args:
        rates: probability of being dropped for each of the L layers.
        sampling: a key of :data:`SAMPLINGS`.
        rng: the only source of randomness.
        need_one_of: layers of which at least one has to run (those with an adapter, when the head
            is frozen): a draw with none of them is thrown away and drawn again. Empty: no such
            condition. :func:`conditioned_rates` gives the marginals that result.

    Returns:
        L gates, True for a layer that runs.

    Raises:
        DroppeftError: unknown sampling, a rate outside [0, 1], a needed layer that does not exist,
            or needed layers that are all dropped (nearly) always.
    """
    rates = explicit_rates(rates, len(rates))
    draw = _sampling(sampling).draw
    needed = _needed(rates, need_one_of)
    while True:
        active = draw(rates, rng)
        if not needed or any(active[layer] for layer in needed):
            return active


def conditioned_rates(
    rates: Sequence[float], sampling: str, need_one_of: Collection[int]
) -> tuple[float, ...]:
    """Return each layer's probability of being dropped, given that a needed layer is active.

    With S the needed layers and p the probability that one draw drops all of them, it is
    (r_l - p) / (1 - p) for l in S and r_l for the others. For ``bernoulli`` p is the product of
    the rates in S. For ``exact`` p is 0 when even the larger count leaves a layer of S (the usual
    case: nothing is conditioned), and the sum of the rates in S minus (the size of S - 1) when
    the layers outside S have rates 0 and 1 only; in between there is no closed form.

    Raises:
        DroppeftError: as :func:`sample_active`, and where no closed form is known.
    """
    rates = explicit_rates(rates, len(rates))
    needed = _needed(rates, need_one_of)
    if not needed:
        return rates
    rejected = _sampling(sampling).all_dropped(rates, needed)
    return tuple(
        (rate - rejected) / (1 - rejected) if layer in needed else rate
        for layer, rate in enumerate(rates)
    )


def expected_active(rates: Sequence[float]) -> float:
    """Return how many of the L layers run on average in a step (without ``need_one_of``)."""
    return len(rates) - math.fsum(rates)


def _sampling(name: str) -> Sampling:
    if name not in SAMPLINGS:
        raise DroppeftError(f"unknown sampling {name!r}; the samplings are {', '.join(SAMPLINGS)}")
    return SAMPLINGS[name]


def _needed(rates: Sequence[float], need_one_of: Collection[int]) -> frozenset[int]:
    """Check that the layers exist and that one of them is active often enough to wait for."""
    for layer in need_one_of:
        if not 0 <= layer < len(rates):
            raise DroppeftError(
                f"layer {layer} cannot be needed: the layers are 0 to {len(rates) - 1}"
            )
    if need_one_of and min(rates[layer] for layer in need_one_of) > _LARGEST_NEEDED_RATE:
        raise DroppeftError(
            f"layers {sorted(need_one_of)} are dropped in (nearly) every step, but one of them "
            f"must run for anything to be trained; lower the drop rate of one to "
            f"{_LARGEST_NEEDED_RATE} or less"
        )
    return frozenset(need_one_of)
