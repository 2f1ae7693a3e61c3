"""Drop rates over depth: sums, bounds, shapes and error messages."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import SHAPES, explicit_rates, layer_rates, protected_ends


@st.composite
def possible(draw: st.DrawFn) -> tuple[float, int, frozenset[int]]:
    """Draw a possible mean, the number of layers, and protected layers."""
    num_layers = draw(st.integers(1, 48))
    protected = draw(st.frozensets(st.integers(0, num_layers - 1)))
    largest = (num_layers - len(protected)) / num_layers
    mean = draw(st.one_of(st.floats(0, largest), st.sampled_from([0.0, largest, largest / 2])))
    return mean, num_layers, protected


@pytest.mark.parametrize("shape", SHAPES)
@given(case=possible())
def test_rates_are_probabilities_with_the_exact_mean(
    shape: str, case: tuple[float, int, frozenset[int]]
) -> None:
    mean, num_layers, protected = case
    rates = layer_rates(mean, shape, num_layers, protected=protected)
    assert len(rates) == num_layers
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(rates[layer] == 0 for layer in protected)
    assert abs(math.fsum(rates) - mean * num_layers) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@given(case=possible())
def test_layers_below_one_keep_the_proportions_of_the_shape(
    shape: str, case: tuple[float, int, frozenset[int]]
) -> None:
    mean, num_layers, protected = case
    weights = SHAPES[shape](num_layers)
    rates = layer_rates(mean, shape, num_layers, protected=protected)
    free = [layer for layer in range(num_layers) if layer not in protected]
    scales = [rates[layer] / weights[layer] for layer in free if rates[layer] < 1]
    assert scales == pytest.approx([scales[0]] * len(scales) if scales else [], rel=1e-9, abs=1e-12)
    # The rate of a clipped layer would be above 1 at the scale of the others.
    for layer in free:
        if rates[layer] == 1 and scales:
            assert weights[layer] * scales[0] >= 1 - 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_layers", [1, 2, 7, 24])
def test_a_shape_gives_one_positive_weight_per_layer(shape: str, num_layers: int) -> None:
    weights = SHAPES[shape](num_layers)
    assert len(weights) == num_layers
    assert min(weights) > 0


def test_shapes_differ_over_depth_as_their_names_say() -> None:
    incremental, decay = SHAPES["incremental"](6), SHAPES["decay"](6)
    assert list(incremental) == sorted(set(incremental))
    assert decay == incremental[::-1]
    normal = SHAPES["normal"](7)
    assert normal[3] == max(normal)
    assert list(normal[:4]) == sorted(set(normal[:4]))
    assert normal == pytest.approx(normal[::-1])
    assert set(SHAPES["uniform"](5)) == {1.0}


def test_the_excess_above_one_goes_to_the_others() -> None:
    # With sum 3, weights 1 2 3 4 give .3 .6 .9 1.2. The last is clipped to 1, which leaves 2 for
    # weights 1 2 3: 1/3, 2/3, 1.
    assert layer_rates(0.75, "incremental", 4) == pytest.approx((1 / 3, 2 / 3, 1, 1))


def test_protected_layers_count_in_the_mean() -> None:
    # Half of 6 layers is 3, over the 4 that may be dropped.
    assert layer_rates(0.5, "uniform", 6, protected={0, 5}) == (0, 0.75, 0.75, 0.75, 0.75, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_mean_drops_with_certainty(shape: str) -> None:
    for num_layers in range(1, 61):
        for never_dropped in (0, num_layers // 3):
            rates = layer_rates(
                (num_layers - never_dropped) / num_layers,
                shape,
                num_layers,
                protected=range(never_dropped),
            )
            assert rates == (0.0,) * never_dropped + (1.0,) * (num_layers - never_dropped)


@given(num_layers=st.integers(1, 60), data=st.data())
def test_the_largest_mean_in_the_message_is_accepted(num_layers: int, data: st.DataObject) -> None:
    never_dropped = range(data.draw(st.integers(1, num_layers)))
    with pytest.raises(DroppeftError, match="largest possible mean") as error:
        layer_rates(1.0, "normal", num_layers, protected=never_dropped)
    named = re.search(r"mean is ([0-9.]+);", str(error.value))
    assert named is not None
    largest = (num_layers - len(never_dropped)) / num_layers
    assert float(named[1]) == pytest.approx(largest, abs=1.01e-4)
    layer_rates(float(named[1]), "normal", num_layers, protected=never_dropped)


def test_all_layers_can_be_protected_if_the_mean_is_zero() -> None:
    assert layer_rates(0, "uniform", 2, protected=protected_ends(2, 1, 1)) == (0, 0)


@pytest.mark.parametrize(
    ("mean", "shape", "num_layers", "protected", "message"),
    [
        (0.5, "sideways", 4, (), "uniform, incremental, decay, normal"),
        (-0.1, "uniform", 4, (), "between 0 and 1"),
        (1.1, "uniform", 4, (), "between 0 and 1"),
        (math.nan, "uniform", 4, (), "between 0 and 1"),
        (0.5, "uniform", 0, (), "0 layers"),
        (0.5, "uniform", 4, (4,), "layers are 0 to 3"),
        (0.5, "uniform", 4, (-1,), "layers are 0 to 3"),
        (0.6, "uniform", 4, (0, 3), "2 of them protected: the largest possible mean is 0.5;"),
    ],
)
def test_an_impossible_mean_is_refused(
    mean: float, shape: str, num_layers: int, protected: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DroppeftError, match=re.escape(message)):
        layer_rates(mean, shape, num_layers, protected=protected)


def test_protected_ends_are_the_first_and_the_last_layers() -> None:
    assert protected_ends(6, 2, 1) == {0, 1, 5}
    assert protected_ends(6, 0, 0) == set()
    assert protected_ends(3, 1, 2) == {0, 1, 2}


@pytest.mark.parametrize(("first", "last"), [(3, 2), (5, 0), (-1, 1), (1, -1)])
def test_impossible_ends_are_refused(first: int, last: int) -> None:
    with pytest.raises(DroppeftError, match="cannot protect"):
        protected_ends(4, first, last)


def test_explicit_rates_do_not_change() -> None:
    assert explicit_rates([0, 0.25, 1], 3) == (0.0, 0.25, 1.0)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.5, 0.5), "2 drop rates were given for 3 layers"),
        ((0.5, 1.5, 0.5), "layer 1 is 1.5"),
        ((0.5, 0.5, -0.1), "layer 2 is -0.1"),
        ((math.nan, 0.5, 0.5), "layer 0 is nan"),
    ],
)
def test_wrong_explicit_rates_are_refused(rates: tuple[float, ...], message: str) -> None:
    with pytest.raises(DroppeftError, match=message):
        explicit_rates(rates, 3)
