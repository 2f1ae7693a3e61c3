"""Arms: their rates have the given mean, and all candidates are possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.bandit.arms import (
    Arm,
    Depth,
    arm_rates,
    candidates,
    first_trained,
    possible_steps,
    steps_of_arm,
    trained_shares,
)
from droppeft.errors import DroppeftError

SIX = Depth(layers=6, frozen=0, protect_first=1, protect_last=1)
TWELVE = Depth(layers=12, frozen=0, protect_first=0, protect_last=1)


def test_without_untrained_layers_an_arm_has_the_rates_of_its_shape() -> None:
    assert arm_rates(Arm(0.5), SIX) == pytest.approx((0, 0.75, 0.75, 0.75, 0.75, 0))


def test_layers_before_the_first_trained_are_never_dropped() -> None:
    """Six of twelve layers are trained, and the last is protected: 6 · .25 over five layers."""
    arm = Arm(0.25, (0.5,))
    assert first_trained(arm, TWELVE) == 6
    assert arm_rates(arm, TWELVE) == pytest.approx((0,) * 6 + (0.3,) * 5 + (0,))


def test_untrained_layers_are_above_the_frozen_ones() -> None:
    depth = Depth(layers=12, frozen=4, protect_first=0, protect_last=0)
    assert first_trained(Arm(0.0, (0.5,)), depth) == 8
    assert arm_rates(Arm(0.5), depth) == (0.0,) * 4 + (0.5,) * 8


@given(
    st.integers(2, 24),
    st.floats(0, 1),
    st.sampled_from(["uniform", "incremental", "decay", "normal"]),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
)
def test_the_mean_is_exact_over_the_trained_layers(
    layers: int, mean: float, shape: str, depths: list[float]
) -> None:
    depth = Depth(layers, 0, 0, 0, shape)
    arm = Arm(mean, tuple(depths))
    lower = first_trained(arm, depth)
    rates = arm_rates(arm, depth)
    assert sum(rates) == pytest.approx(mean * (layers - lower), abs=1e-6)
    assert all(0 <= rate <= 1 for rate in rates)
    assert not any(rates[:lower])


def test_candidates_are_the_possible_combinations_each_once() -> None:
    """Three trained layers of which two are protected cannot drop half of them."""
    found = candidates((0.0, 0.25, 0.5), ((1.0,), (0.5,)), (1.0,), SIX)
    assert found == (
        Arm(),
        Arm(0.25),
        Arm(0.5),
        Arm(0.0, (0.5,)),
        Arm(0.25, (0.5,)),
    )


def test_equal_shares_of_untrained_layers_are_one_candidate() -> None:
    found = candidates((0.0,), ((0.5,), (0.49,), (1.0,), (0.98,)), (1.0, 0.5), SIX)
    half = (0.5,)
    assert found == (Arm(0.0, half), Arm(), Arm(0.0, half, 0.5), Arm(steps=0.5))
    repeated = candidates(
        (0.0,), ((1.0, 1.0), (1.0,), (1.0, 1.0, 0.5, 0.5), (0.5, 1.0)), (1.0,), SIX
    )
    assert repeated == (Arm(), Arm(0.0, (1.0, 0.5)))


def test_no_possible_arm_is_an_error() -> None:
    with pytest.raises(DroppeftError, match=r"lower configurator\.means, or protect fewer"):
        candidates((0.9,), ((1.0,), (0.5,)), (1.0,), SIX)


def test_arms_that_take_as_many_steps_are_one() -> None:
    """Their worth is in proportion to the steps that they take."""
    assert possible_steps((1.0, 0.5, 0.25), 3) == (1.0, 2 / 3, 1 / 3)
    assert possible_steps((1.0, 0.5, 0.25), 1) == (1.0,)
    assert possible_steps((1.0, 0.5, 0.25), 20) == (1.0, 0.5, 0.25)


def test_labels_describe_arms() -> None:
    assert Arm().label == "all layers"
    assert Arm(0.25, (0.5,)).label == "upper 50% of the layers, 25% of them dropped"
    several = Arm(0.0, (1.0, 0.5, 0.25), 0.5)
    assert (
        several.label == "in each step the upper 100%, 50% or 25% of the layers, 50% of the steps"
    )
    often = Arm(0.0, (1.0, 0.67, 0.33, 0.33))
    assert often.label == "in each step the upper 100%, 67% or 33% (in 2 of 4 steps) of the layers"


def test_an_arm_trains_a_layer_in_the_steps_that_reach_it() -> None:
    depth = Depth(layers=6, frozen=2, protect_first=0, protect_last=1)
    assert trained_shares(Arm(0.0, (1.0, 0.5, 0.5)), depth) == pytest.approx(
        (0, 0, 1 / 3, 1 / 3, 1, 1)
    )
    assert trained_shares(Arm(0.25, (0.5,)), depth) == pytest.approx((0, 0, 0, 0, 0.5, 1))
    assert [steps_of_arm(Arm(steps=share), 10) for share in (1, 0.25, 0.01)] == [10, 2, 1]
