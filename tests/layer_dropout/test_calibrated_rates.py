"""Drop rates that follow from what each layer is worth."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import Calibration, calibrated_rates
from droppeft.layer_dropout.calibration import EXPENSIVE, NOISE, expensive_layers

LOSSES = (8.0, 0.1, 0.2, 0.4, 0.2, 0.1, 0.2, 3.0)
"""Their median is 0.2, so that layers 0 and 7 are expensive."""


def calibration(added_loss: tuple[float, ...], error: tuple[float, ...]) -> Calibration:
    layers = len(added_loss)
    gradient = tuple(map(float, range(1, layers + 1)))
    return Calibration(added_loss, error, gradient, gradient, 2.0, 8, 100, 200, 0, 1.0)


@st.composite
def measured(draw: st.DrawFn) -> tuple[float, list[float], list[float], frozenset[int]]:
    """Draw a possible mean, added losses, their errors, and layers that are protected."""
    layers = draw(st.integers(1, 40))
    added = draw(st.lists(st.floats(-1, 20), min_size=layers, max_size=layers))
    error = draw(st.lists(st.floats(0, 1), min_size=layers, max_size=layers))
    protected = draw(st.frozensets(st.integers(0, layers - 1), max_size=layers // 2))
    mean = draw(st.floats(0, (layers - len(protected)) / layers))
    return mean, added, error, protected


@given(case=measured())
def test_the_mean_is_exact_and_a_layer_that_adds_less_is_dropped_more(
    case: tuple[float, list[float], list[float], frozenset[int]],
) -> None:
    mean, added, error, protected = case
    rates = calibrated_rates(mean, added, error, protected=protected)
    assert abs(math.fsum(rates) - mean * len(added)) < 1e-9
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(rates[layer] == 0 for layer in protected)
    free = [layer for layer in range(len(added)) if layer not in protected]
    for one in free:
        for other in free:
            if added[one] < added[other]:
                assert rates[one] >= rates[other] - 1e-12


def test_rates_are_inverse_to_the_added_loss_and_expensive_layers_are_protected() -> None:
    rates = calibrated_rates(0.25, LOSSES)
    # Weights 10, 5, 2.5, 5, 10, 5 for a sum of 2.
    expected = (0, 20 / 37.5, 10 / 37.5, 5 / 37.5, 10 / 37.5, 20 / 37.5, 10 / 37.5, 0)
    assert rates == pytest.approx(expected)
    assert expensive_layers(LOSSES, [0.0] * 8) == {0, 7}


def test_differences_within_the_noise_make_no_difference() -> None:
    noise = 0.1
    added = (-0.5, 0.01, NOISE * noise, 0.15, 2 * EXPENSIVE * NOISE * noise)
    assert calibrated_rates(0.4, added, [noise] * 5) == pytest.approx((0.5, 0.5, 0.5, 0.5, 0))


def test_layers_that_add_nothing_are_dropped_alike() -> None:
    assert calibrated_rates(0.5, (-1.0, 0.0, 5.0, -2.0)) == (0.5,) * 4


def test_if_the_mean_is_impossible_the_cheapest_expensive_layers_are_dropped() -> None:
    rates = calibrated_rates(7 / 8, LOSSES)
    assert rates == (0, *[1.0] * 7)
    assert calibrated_rates(1.0, LOSSES) == (1.0,) * 8
    with pytest.raises(DroppeftError, match=r"largest possible mean is 0\.875"):
        calibrated_rates(1.0, LOSSES, protected={3})


def test_rates_of_the_upper_layers_alone() -> None:
    found = calibration(LOSSES, (0.0,) * 8)
    assert found.limit == pytest.approx(0.8)
    rates = found.rates(0.5, first=4, protected={0})
    assert rates == calibrated_rates(0.5, LOSSES[4:], protected={0})
    assert (len(rates), rates[0]) == (4, 0)
    assert sum(found.gradient_share) == pytest.approx(1)


@pytest.mark.parametrize(
    ("mean", "added", "error", "message"),
    [
        (0.5, (0.1, 0.2), (0.1,), "1 standard errors were given for 2 added losses"),
        (0.5, (0.1, math.nan), None, "the added loss of layer 1 is nan"),
        (0.5, (), None, "0 layers"),
        (math.nan, (0.1, 0.2), None, "between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(
    mean: float,
    added: tuple[float, ...],
    error: tuple[float, ...] | None,
    message: str,
) -> None:
    with pytest.raises(DroppeftError, match=re.escape(message)):
        calibrated_rates(mean, added, error)
