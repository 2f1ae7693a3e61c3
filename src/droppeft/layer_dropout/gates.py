"""Draw which layers run in a step, from the drop rates of the layers.

Source: independent gates per layer and mini-batch are from DropPEFT (arXiv:2503.10217). Dropping an
exact number of layers is ours, by randomised systematic sampling (Madow 1949; Goodman and Kish
1950).
"""

import math
import random
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.rates import explicit_rates

# Exact sampling represents rates as integer multiples of 2^-40. Integers add up exactly, so a sum
# such as 6 x (1/3) cannot become 1.9999999999999998 and drop one layer too few or too many.
_ONE = 1 << 40
_ROUNDING = 1e-9

# Gates are redrawn until a needed layer runs, which takes 1 / (1 - rate) draws on average.
_LARGEST_NEEDED_RATE = 0.999


class Sampling(NamedTuple):
    """A way to draw gates.

    Attributes:
        draw: function of L rates and a random generator that returns L gates, True for a layer
            that runs.
        all_dropped: function of L rates and a set of layers that returns the probability that one
            draw drops all of these layers.
    """

    draw: Callable[[Sequence[float], random.Random], tuple[bool, ...]]
    all_dropped: Callable[[Sequence[float], frozenset[int]], float]


def _draw_bernoulli(rates: Sequence[float], rng: random.Random) -> tuple[bool, ...]:
    # random() lies in [0, 1): a layer of rate 0 is never dropped, one of rate 1 always.
    return tuple(rng.random() >= rate for rate in rates)


def _all_dropped_bernoulli(rates: Sequence[float], layers: frozenset[int]) -> float:
    return math.prod(rates[layer] for layer in layers)


def _draw_exact(rates: Sequence[float], rng: random.Random) -> tuple[bool, ...]:
    """Draw gates by systematic sampling in random order.

    The rates are laid end to end as intervals, and each layer whose interval contains a point of a
    grid with spacing 1 is dropped. The offset of the grid is uniform, so a layer is dropped with
    probability equal to its rate in any order. The order is random so that no two layers are always
    dropped together.
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
    """Return the rates as multiples of 2^-40; a sum that is whole within rounding stays whole."""
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
            "conditioned rates of exact sampling have no closed form if layers outside need_one_of "
            "have rates between 0 and 1; estimate them by drawing gates, or use bernoulli"
        )
    # All of them are dropped only if the larger of the two possible numbers is drawn.
    return math.fsum(needed) - (len(layers) - 1)


SAMPLINGS: dict[str, Sampling] = {
    "exact": Sampling(_draw_exact, _all_dropped_exact),
    "bernoulli": Sampling(_draw_bernoulli, _all_dropped_bernoulli),
}
"""Sampling by name. Both drop layer l with probability r_l.

``exact``: the number of dropped layers is the sum of the rates, rounded down or up if it is not
whole. Rates are rounded to 2^-40, and a sum within 1e-9 of a whole number counts as whole.
``bernoulli``: gates are independent, so the number of dropped layers varies.
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
        rates: probability of being dropped, for each of the L layers.
        sampling: a key of :data:`SAMPLINGS`.
        rng: generator of all random numbers.
        need_one_of: layers of which at least one must run, such as those with an adapter if the
            head is frozen. Gates are drawn again until one of these layers runs;
            :func:`conditioned_rates` returns the resulting drop rates. If empty, there is no
            condition.

    Returns:
        L gates; True for a layer that runs.

    Raises:
        DroppeftError: if the sampling is unknown, a rate is outside [0, 1], a layer of
            ``need_one_of`` does not exist, or these layers are all dropped in nearly every draw.
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
    """Return each layer's probability of being dropped by :func:`sample_active`.

    Let S be the layers of ``need_one_of``, and p the probability that one draw drops all of them.
    The result is (r_l - p) / (1 - p) for l in S, and r_l for all other layers. For ``bernoulli``,
    p is the product of the rates in S. For ``exact``, p is 0 if S has more layers than a draw can
    drop, so that the rates do not change; it is the sum of the rates in S minus (the size of
    S - 1) if all layers outside S have rate 0 or 1; otherwise there is no closed form.

    Raises:
        DroppeftError: as :func:`sample_active`, or if there is no closed form.
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
    """Return the mean number of layers that run in a step, without ``need_one_of``."""
    return len(rates) - math.fsum(rates)


def _sampling(name: str) -> Sampling:
    if name not in SAMPLINGS:
        raise DroppeftError(f"unknown sampling {name!r}; the samplings are {', '.join(SAMPLINGS)}")
    return SAMPLINGS[name]


def _needed(rates: Sequence[float], need_one_of: Collection[int]) -> frozenset[int]:
    """Check that the layers exist and that redrawing until one of them runs ends soon."""
    for layer in need_one_of:
        if not 0 <= layer < len(rates):
            raise DroppeftError(
                f"need_one_of has layer {layer}, but the layers are 0 to {len(rates) - 1}"
            )
    if need_one_of and min(rates[layer] for layer in need_one_of) > _LARGEST_NEEDED_RATE:
        raise DroppeftError(
            f"layers {sorted(need_one_of)} are dropped in nearly every step, but one of them must "
            "run for anything to be trained; lower the drop rate of one of them to "
            f"{_LARGEST_NEEDED_RATE} or less"
        )
    return frozenset(need_one_of)
