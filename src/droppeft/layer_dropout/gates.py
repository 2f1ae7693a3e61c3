"""Draw which layers run in a step, from the drop rates of the layers.

Source: independent gates per layer and mini-batch are from DropPEFT (arXiv:2503.10217). Dropping an
exact number of layers is ours, by randomised systematic sampling (Madow 1949; Goodman and Kish
1950).
"""

import math
import random
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.rates import explicit_rates

# Exact sampling represents rates as integer multiples of 2^-40. Integers add up exactly, so a sum
# such as 6 x (1/3) cannot become 1.9999999999999998 and drop one layer too few or too many.
_ONE = 1 << 40
_ROUNDING = 1e-9

# Gates are redrawn until a needed layer runs, which takes 1 / (1 - rate) draws on average.
_LARGEST_NEEDED_RATE = 0.999


def _draw_bernoulli(rates: Sequence[float], rng: random.Random) -> tuple[bool, ...]:
    # random() lies in [0, 1): a layer of rate 0 is never dropped, one of rate 1 always.
    return tuple(rng.random() >= rate for rate in rates)


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


SAMPLINGS: dict[str, Callable[[Sequence[float], random.Random], tuple[bool, ...]]] = {
    "exact": _draw_exact,
    "bernoulli": _draw_bernoulli,
}
"""By name, a function from L rates to L gates. Both drop layer l with probability r_l.

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
            head is frozen. Gates are drawn again until one of these layers runs. If empty, there
            is no condition.

    Returns:
        L gates; True for a layer that runs.

    Raises:
        DroppeftError: if the sampling is unknown, a rate is outside [0, 1], a layer of
            ``need_one_of`` does not exist, or these layers are all dropped in nearly every draw.
    """
    rates = explicit_rates(rates, len(rates))
    if sampling not in SAMPLINGS:
        raise DroppeftError(
            f"unknown sampling {sampling!r}; the samplings are {', '.join(SAMPLINGS)}"
        )
    needed = _needed(rates, need_one_of)
    while True:
        active = SAMPLINGS[sampling](rates, rng)
        if not needed or any(active[layer] for layer in needed):
            return active


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
