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
)
from droppeft.errors import DroppeftError

SIX = Depth(layers=6, frozen=0, protect_first=1, protect_last=1)
TWELVE = Depth(layers=12, frozen=0, protect_first=0, protect_last=1)


def test_without_untrained_layers_an_arm_has_the_rates_of_its_shape() -> None:
    assert arm_rates(Arm(0.5, 0.0), SIX) == pytest.approx((0, 0.75, 0.75, 0.75, 0.75, 0))


def test_layers_before_the_first_trained_are_never_dropped() -> None:
    """Six of twelve layers are trained, and the last is protected: 6 · .25 over five layers."""
    arm = Arm(0.25, 0.5)
    assert first_trained(arm, TWELVE) == 6
    assert arm_rates(arm, TWELVE) == pytest.approx((0,) * 6 + (0.3,) * 5 + (0,))


def test_untrained_layers_are_above_the_frozen_ones() -> None:
    depth = Depth(layers=12, frozen=4, protect_first=0, protect_last=0)
    assert first_trained(Arm(0.0, 0.5), depth) == 8
    assert arm_rates(Arm(0.5, 0.0), depth) == (0.0,) * 4 + (0.5,) * 8


@given(
    st.integers(2, 24),
    st.floats(0, 1),
    st.sampled_from(["uniform", "incremental", "decay", "normal"]),
    st.floats(0, 0.9),
)
def test_the_mean_is_exact_over_the_trained_layers(
    layers: int, mean: float, shape: str, untrained: float
) -> None:
    depth = Depth(layers, 0, 0, 0, shape)
    arm = Arm(mean, untrained)
    lower = first_trained(arm, depth)
    if lower == layers:
        with pytest.raises(DroppeftError, match="trains no layer"):
            arm_rates(arm, depth)
        return
    rates = arm_rates(arm, depth)
    assert sum(rates) == pytest.approx(mean * (layers - lower), abs=1e-6)
    assert all(0 <= rate <= 1 for rate in rates)
    assert not any(rates[:lower])


def test_candidates_are_the_possible_combinations_each_once() -> None:
    """Three trained layers of which two are protected cannot drop half of them."""
    found = candidates((0.0, 0.25, 0.5), (0.0, 0.5), SIX)
    assert found == (
        Arm(0.0, 0.0),
        Arm(0.25, 0.0),
        Arm(0.5, 0.0),
        Arm(0.0, 0.5),
        Arm(0.25, 0.5),
    )


def test_equal_shares_of_untrained_layers_are_one_candidate() -> None:
    found = candidates((0.0,), (0.5, 0.51, 0.0, 0.02), SIX)
    assert found == (Arm(0.0, 0.5), Arm(0.0, 0.0))


def test_no_possible_arm_is_an_error() -> None:
    with pytest.raises(DroppeftError, match=r"lower configurator\.means, or protect fewer"):
        candidates((0.9,), (0.0, 0.5), SIX)


def test_labels_describe_arms() -> None:
    assert Arm(0.0, 0.0).label == "all layers"
    assert Arm(0.25, 0.5).label == "upper 50% of the layers, 25% of them dropped"
