"""Arms: rates with the mean they say, and nothing impossible among the candidates."""

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


def test_an_arm_without_a_prefix_has_the_typical_rates() -> None:
    assert arm_rates(Arm(0.5, "uniform", 0.0), SIX, None) == pytest.approx(
        (0, 0.75, 0.75, 0.75, 0.75, 0)
    )


def test_layers_before_the_first_trained_are_never_dropped() -> None:
    """Six of twelve are trained, of those the last is protected: 6 · .25 over five layers."""
    arm = Arm(0.25, "uniform", 0.5)
    assert first_trained(arm, TWELVE) == 6
    assert arm_rates(arm, TWELVE, None) == pytest.approx((0,) * 6 + (0.3,) * 5 + (0,))


def test_a_prefix_comes_behind_the_frozen_layers() -> None:
    depth = Depth(layers=12, frozen=4, protect_first=0, protect_last=0)
    assert first_trained(Arm(0.0, "uniform", 0.5), depth) == 8
    assert arm_rates(Arm(0.5, "uniform", 0.0), depth, None) == (0.0,) * 4 + (0.5,) * 8


def test_what_matters_least_is_dropped_most() -> None:
    """Inverse importances 1, 1/2, 1/4 and 1 share 4 · .25."""
    depth = Depth(layers=4, frozen=0, protect_first=0, protect_last=0)
    arm = Arm(0.25, IMPORTANCE, 0.0)
    expected = [part / 2.75 for part in (1, 0.5, 0.25, 1)]
    assert arm_rates(arm, depth, [1.0, 2.0, 4.0, 1.0]) == pytest.approx(expected)


@pytest.mark.parametrize("unknown", [None, [1.0, 0.0, 2.0, 1.0]])
def test_importance_that_is_not_known_is_uniform(unknown: list[float] | None) -> None:
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
    layers: int, mean: float, shape: str, prefix: float, importance: list[float]
) -> None:
    depth = Depth(layers, 0, 0, 0)
    arm = Arm(mean, shape, prefix)
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


def test_prefixes_of_the_same_layers_are_one() -> None:
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


def test_labels_are_for_people() -> None:
    assert Arm(0.0, "uniform", 0.0).label == "nothing dropped"
    assert Arm(0.25, "decay", 0.5).label == "25% dropped (decay), first 50% not trained"
