"""Arms: their rates have the given mean, and all candidates are possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.bandit.arms import (
    IMPORTANCE,
    Arm,
    Depth,
    arm_rates,
    candidates,
    first_trained,
    neighbours,
)
from droppeft.errors import DroppeftError

SIX = Depth(layers=6, frozen=0, protect_first=1, protect_last=1)
TWELVE = Depth(layers=12, frozen=0, protect_first=0, protect_last=1)


def test_without_untrained_layers_an_arm_has_the_rates_of_its_shape() -> None:
    assert arm_rates(Arm(0.5, "uniform", 0.0), SIX, None) == pytest.approx(
        (0, 0.75, 0.75, 0.75, 0.75, 0)
    )


def test_layers_before_the_first_trained_are_never_dropped() -> None:
    """Six of twelve layers are trained, and the last is protected: 6 · .25 over five layers."""
    arm = Arm(0.25, "uniform", 0.5)
    assert first_trained(arm, TWELVE) == 6
    assert arm_rates(arm, TWELVE, None) == pytest.approx((0,) * 6 + (0.3,) * 5 + (0,))


def test_untrained_layers_are_above_the_frozen_ones() -> None:
    depth = Depth(layers=12, frozen=4, protect_first=0, protect_last=0)
    assert first_trained(Arm(0.0, "uniform", 0.5), depth) == 8
    assert arm_rates(Arm(0.5, "uniform", 0.0), depth, None) == (0.0,) * 4 + (0.5,) * 8


def test_the_least_important_layer_is_dropped_most() -> None:
    """Inverse importances 1, 1/2, 1/4 and 1 share 4 · .25."""
    depth = Depth(layers=4, frozen=0, protect_first=0, protect_last=0)
    arm = Arm(0.25, IMPORTANCE, 0.0)
    expected = [part / 2.75 for part in (1, 0.5, 0.25, 1)]
    assert arm_rates(arm, depth, [1.0, 2.0, 4.0, 1.0]) == pytest.approx(expected)


@pytest.mark.parametrize("unknown", [None, [1.0, 0.0, 2.0, 1.0]])
def test_unknown_importance_gives_uniform_rates(unknown: list[float] | None) -> None:
    depth = Depth(layers=4, frozen=0, protect_first=0, protect_last=0)
    assert arm_rates(Arm(0.25, IMPORTANCE, 0.0), depth, unknown) == (0.25,) * 4


@given(
    st.integers(2, 24),
    st.floats(0, 1),
    st.sampled_from(["uniform", "incremental", "decay", "normal", IMPORTANCE]),
    st.floats(0, 0.9),
    st.lists(st.floats(0.01, 10), min_size=24, max_size=24),
)
def test_the_mean_is_exact_over_the_trained_layers(
    layers: int, mean: float, shape: str, untrained: float, importance: list[float]
) -> None:
    depth = Depth(layers, 0, 0, 0)
    arm = Arm(mean, shape, untrained)
    lower = first_trained(arm, depth)
    if lower == layers:
        with pytest.raises(DroppeftError, match="trains no layer"):
            arm_rates(arm, depth, importance[:layers])
        return
    rates = arm_rates(arm, depth, importance[:layers])
    assert sum(rates) == pytest.approx(mean * (layers - lower), abs=1e-6)
    assert all(0 <= rate <= 1 for rate in rates)
    assert not any(rates[:lower])


def test_candidates_are_the_possible_combinations_each_once() -> None:
    """Three trained layers of which two are protected cannot drop half of them."""
    found = candidates((0.0, 0.25, 0.5), ("uniform", "decay"), (0.0, 0.5), SIX)
    assert found == (
        Arm(0.0, "uniform", 0.0),
        Arm(0.25, "uniform", 0.0),
        Arm(0.25, "decay", 0.0),
        Arm(0.5, "uniform", 0.0),
        Arm(0.5, "decay", 0.0),
        Arm(0.0, "uniform", 0.5),
        Arm(0.25, "uniform", 0.5),
        Arm(0.25, "decay", 0.5),
    )


def test_equal_shares_of_untrained_layers_are_one_candidate() -> None:
    found = candidates((0.0,), ("uniform",), (0.5, 0.51, 0.0, 0.02), SIX)
    assert found == (Arm(0.0, "uniform", 0.5), Arm(0.0, "uniform", 0.0))


def test_no_possible_arm_is_an_error() -> None:
    with pytest.raises(DroppeftError, match=r"lower configurator\.means, or protect fewer"):
        candidates((0.9,), ("uniform",), (0.0, 0.5), SIX)


def test_neighbours_differ_in_one_thing_and_are_possible() -> None:
    near = neighbours(Arm(0.25, "uniform", 0.5), 0.125, ("uniform", "decay"), SIX)
    assert set(near) == {
        Arm(0.125, "uniform", 0.5),
        Arm(0.25, "decay", 0.5),
        Arm(0.25, "uniform", 2 / 6),
    }
    full = neighbours(Arm(0.0, "uniform", 0.0), 0.125, ("decay",), SIX)
    assert set(full) == {Arm(0.125, "uniform", 0.0), Arm(0.0, "uniform", 1 / 6)}


def test_labels_describe_arms() -> None:
    assert Arm(0.0, "uniform", 0.0).label == "nothing dropped"
    assert Arm(0.25, "decay", 0.5).label == "25% dropped (decay), first 50% not trained"
