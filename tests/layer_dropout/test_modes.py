"""Modes of layers: what is drawn, how often, and what is refused."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.modes import LayerModes, Mode, starts_of

DRAWS = 4000


@given(
    st.integers(1, 12),
    st.integers(0, 3),
    st.booleans(),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_no_layer_is_trained_below_one_that_runs_forward_only(
    above: int, frozen: int, cached: bool, depths: list[float], seed: int
) -> None:
    layers = above + frozen
    rates = (0.0,) * frozen + (0.3,) * above
    modes = LayerModes(
        layers, frozen, cached, starts_of(depths, layers, frozen), rates, "bernoulli"
    )
    drawn = modes.draw(random.Random(seed), random.Random(seed + 1))
    first = Mode.CACHED if cached else Mode.FORWARD
    assert drawn[:frozen] == (first,) * frozen
    trained = [layer for layer, mode in enumerate(drawn) if mode is Mode.TRAIN]
    forward = [layer for layer, mode in enumerate(drawn) if mode is Mode.FORWARD]
    assert not trained or not forward or max(forward) < min(trained)
    assert Mode.CACHED not in drawn[frozen:]


def test_drawn_modes_have_the_expected_shares() -> None:
    modes = LayerModes(6, 1, True, starts=(1, 3, 5, 5), rates=(0, 0.5, 0, 0.5, 0, 0))
    rng, others = random.Random(0), random.Random(1)
    draws = [modes.draw(rng, others) for _ in range(DRAWS)]
    shares = modes.shares()
    for layer in range(6):
        assert sum(shares[mode][layer] for mode in Mode) == pytest.approx(1)
        for mode in Mode:
            found = sum(drawn[layer] is mode for drawn in draws) / DRAWS
            assert found == pytest.approx(shares[mode][layer], abs=0.03), (layer, mode)


def test_a_layer_that_is_needed_is_trained() -> None:
    modes = LayerModes(2, starts=(0, 1), rates=(0.5, 0.9), sampling="bernoulli")
    for seed in range(50):
        drawn = modes.draw(random.Random(seed), random.Random(seed), need_one_of=(0, 1))
        assert Mode.TRAIN in drawn


def test_depths_are_fractions_of_the_layers_above_the_frozen_ones() -> None:
    assert starts_of((1, 0.67, 0.33, 0.01), 30) == (0, 10, 20, 29)
    assert starts_of((1, 0.5), 6, 2) == (2, 4)


@pytest.mark.parametrize("depths", [(), (0.0,), (1.5,), (1, -0.5)])
def test_impossible_depths_are_refused(depths: tuple[float, ...]) -> None:
    with pytest.raises(DroppeftError, match="must be above 0 and at most 1"):
        starts_of(depths, 6)


@pytest.mark.parametrize("starts", [(), (-1,), (7,)])
def test_impossible_starts_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(DroppeftError, match="the lowest trained layer"):
        LayerModes(6, starts=starts)
