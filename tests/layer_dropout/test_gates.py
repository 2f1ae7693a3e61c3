"""Gates: number of dropped layers, drop rates of layers, and conditions on draws."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marginals import DRAWS, assert_marginals, assert_share, conditioned

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import (
    SAMPLINGS,
    SHAPES,
    layer_rates,
    protected_ends,
    sample_active,
)

RATES = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.1, 1 / 3, 0.5, 1e-12, 1 - 1e-12])),
    min_size=1,
    max_size=40,
)
NASTY = {
    "ten tenths": (0.1,) * 10,  # the float sum is 0.9999999999999999
    "six thirds": (1 / 3,) * 6,
    "sevenths": (1 / 7,) * 49,
    "two thirds": (2 / 3,) * 12,
    "0.7 + 0.2 + 0.1": (0.7, 0.2, 0.1),  # the float sum is 0.9999999999999999
    "0.1 * 3 + 0.7": (0.1 * 3, 0.7),
    "tiny and almost one": (1e-10, 1 - 1e-10),
    "almost nothing": (1e-11, 0.0),
    "beside a certain one": (1.0, 0.1, 0.2, 0.7, 0.0),
}


def dropped(active: tuple[bool, ...]) -> int:
    return len(active) - sum(active)


def draws(
    rates: tuple[float, ...], sampling: str, needed: tuple[int, ...] = ()
) -> list[tuple[bool, ...]]:
    rng = random.Random(20)
    return [sample_active(rates, sampling, rng, need_one_of=needed) for _ in range(DRAWS)]


@given(rates=RATES, seed=st.integers(0, 2**32))
def test_exact_drops_the_sum_of_the_rates_or_a_neighbour(rates: list[float], seed: int) -> None:
    count = dropped(sample_active(rates, "exact", random.Random(seed)))
    total = math.fsum(rates)
    if abs(total - round(total)) <= 1e-9:
        assert count == round(total)
    else:
        assert count in (math.floor(total), math.ceil(total))


@given(rates=RATES, seed=st.integers(0, 2**32), sampling=st.sampled_from(sorted(SAMPLINGS)))
def test_rates_of_zero_and_one_are_certain(rates: list[float], seed: int, sampling: str) -> None:
    active = sample_active(rates, sampling, random.Random(seed))
    assert len(active) == len(rates)
    assert all(runs for runs, rate in zip(active, rates, strict=True) if rate == 0)
    assert not any(runs for runs, rate in zip(active, rates, strict=True) if rate == 1)


@pytest.mark.parametrize("rates", NASTY.values(), ids=NASTY)
def test_a_sum_that_is_whole_but_for_rounding_is_whole(rates: tuple[float, ...]) -> None:
    rng = random.Random(0)
    counts = {dropped(sample_active(rates, "exact", rng)) for _ in range(300)}
    assert counts == {round(math.fsum(rates))}


class FixedRandom(random.Random):
    """A generator with a fixed order of layers and offset of the grid."""

    def __init__(self, order: tuple[int, ...], offset: int) -> None:
        super().__init__(0)
        self.order, self.offset = order, offset

    def shuffle(self, x: list[int]) -> None:
        x[:] = self.order

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return self.offset % start


@pytest.mark.parametrize("rates", NASTY.values(), ids=NASTY)
def test_no_offset_of_the_grid_changes_a_whole_count(rates: tuple[float, ...]) -> None:
    # Random offsets almost never fall into a gap of 2^-40, but the ends of the range would.
    order = tuple(range(len(rates)))
    for offset in (0, 1, 2, -1, -2):
        assert dropped(sample_active(rates, "exact", FixedRandom(order, offset))) == round(
            sum(rates)
        )


def test_rounding_to_a_whole_sum_does_not_change_rates_of_zero_and_one() -> None:
    # In multiples of 2^-40, six thirds are 2 less than two, and three two-thirds are 1 more than
    # two. If layer 0 took the difference, a grid offset at an end of its range would show it.
    assert sample_active((0.0, *[1 / 3] * 6), "exact", FixedRandom(tuple(range(7)), -1))[0]
    assert not sample_active((1.0, *[2 / 3] * 3), "exact", FixedRandom(tuple(range(4)), 0))[0]


def test_exact_marginals_hold_in_every_order() -> None:
    # With rates in quarters only the quarter of the grid's offset matters. Four equally likely
    # offsets are all cases, so the drop rates can be computed exactly.
    rates = (0.25, 0.5, 0.75, 0.5, 1.0, 0.0)
    for order in itertools.permutations(range(6)):
        counts = [0] * 6
        for quarter in range(4):
            active = sample_active(rates, "exact", FixedRandom(order, quarter << 38))
            counts = [count + (not runs) for count, runs in zip(counts, active, strict=True)]
        assert counts == [1, 2, 3, 2, 4, 0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("mean", "ends", "clipped"),
    [
        (1 / 3, (0, 0), {}),
        (0.55, (1, 0), {"incremental": 1, "decay": 1}),
        (0.7, (0, 2), {"incremental": 5, "decay": 4, "normal": 5}),
    ],
    ids=["every layer", "first protected", "last two protected"],
)
def test_marginals_are_the_rates(
    sampling: str, shape: str, mean: float, ends: tuple[int, int], clipped: dict[str, int]
) -> None:
    rates = layer_rates(mean, shape, 9, protected=protected_ends(9, *ends))
    assert (rates.count(0.0), rates.count(1.0)) == (sum(ends), clipped.get(shape, 0))
    assert math.fsum(rates) == pytest.approx(9 * mean)
    assert_marginals(draws(rates, sampling), rates)


def test_exact_counts_have_the_right_mean() -> None:
    rng = random.Random(3)
    larger = sum(dropped(sample_active((0.45,) * 5, "exact", rng)) == 3 for _ in range(DRAWS))
    assert_share(larger, 0.25)  # 5 x 0.45 = 2.25


def test_exact_draws_every_set_of_layers() -> None:
    # Without the random order, only layers at a fixed distance would be dropped together.
    rng = random.Random(4)
    drawn = {sample_active((0.5,) * 6, "exact", rng) for _ in range(1000)}
    assert len(drawn) == math.comb(6, 3)


def test_bernoulli_gates_are_independent() -> None:
    rng = random.Random(5)
    rates = (0.3, 0.6)
    both = sum(dropped(sample_active(rates, "bernoulli", rng)) == 2 for _ in range(DRAWS))
    assert_share(both, 0.18)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_generator_determines_the_gates(sampling: str) -> None:
    rates = layer_rates(0.4, "normal", 12)

    def ten(seed: int) -> list[tuple[bool, ...]]:
        rng = random.Random(seed)
        return [sample_active(rates, sampling, rng) for _ in range(10)]

    assert ten(7) == ten(7)
    assert ten(7) != ten(8)


@pytest.mark.parametrize(
    ("rates", "needed"),
    [((0.5, 0.8, 0.3), (0, 1)), ((0.9, 0.9, 0.9), (0, 1, 2)), ((0.7, 1.0, 0.0), (0, 1))],
)
def test_conditioned_marginals_are_those_of_the_draws(
    rates: tuple[float, ...], needed: tuple[int, ...]
) -> None:
    assert_marginals(draws(rates, "bernoulli", needed), conditioned(rates, needed))


@given(
    rates=RATES.filter(lambda rates: min(rates) <= 0.999),
    seed=st.integers(0, 2**32),
    sampling=st.sampled_from(sorted(SAMPLINGS)),
)
def test_a_needed_layer_is_always_active(rates: list[float], seed: int, sampling: str) -> None:
    needed = {rates.index(min(rates)), len(rates) - 1}
    active = sample_active(rates, sampling, random.Random(seed), need_one_of=needed)
    assert any(active[layer] for layer in needed)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rate", [1.0, 1 - 1e-9])
def test_needing_a_layer_that_never_runs_is_refused(sampling: str, rate: float) -> None:
    with pytest.raises(DroppeftError, match="one of them must run"):
        sample_active((0.0, rate, 1.0), sampling, random.Random(0), need_one_of={1, 2})


@pytest.mark.parametrize(
    ("rates", "sampling", "needed", "message"),
    [
        ((0.5,), "sometimes", (), "exact, bernoulli"),
        ((0.5, 1.5), "exact", (), "layer 1 is 1.5"),
        ((0.5, 0.5), "exact", (2,), "layers are 0 to 1"),
        ((0.5, 0.5), "bernoulli", (-1,), "layers are 0 to 1"),
    ],
)
def test_wrong_arguments_are_refused(
    rates: tuple[float, ...], sampling: str, needed: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DroppeftError, match=message):
        sample_active(rates, sampling, random.Random(0), need_one_of=needed)
