"""Named metrics: which of two values is better, and how values are written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.tasks.metrics import (
    ACCURACY,
    F1,
    LOSS,
    METRICS,
    PERPLEXITY,
    TOKEN_ACCURACY,
    Metric,
    metrics_in,
    primary_metric,
    quality,
)

UP, DOWN = ACCURACY, LOSS


def test_every_metric_is_known_by_its_name() -> None:
    assert {
        metric.name: metric for metric in (ACCURACY, F1, LOSS, PERPLEXITY, TOKEN_ACCURACY)
    } == METRICS
    assert [metric for metric in METRICS.values() if not metric.higher_is_better] == [
        LOSS,
        PERPLEXITY,
    ]


def test_the_key_says_whose_value_it_is() -> None:
    assert ACCURACY.key("global") == "global_accuracy"
    assert TOKEN_ACCURACY.key("initial") == "initial_token_accuracy"


def test_a_gain_is_positive_if_the_value_is_better() -> None:
    assert UP.gain(0.75, over=0.5) == 0.25
    assert UP.gain(0.5, over=0.75) == -0.25
    assert DOWN.gain(0.75, over=0.5) == -0.25
    assert DOWN.gain(0.5, over=0.75) == 0.25


@pytest.mark.parametrize(
    ("metric", "pairs", "expected"),
    [
        (UP, [(0.5, 1), (0.8, 2), (0.8, 3), (0.1, 4)], (0.8, 2)),
        (DOWN, [(2.0, 1), (0.5, 2), (0.5, 3), (0.9, 4)], (0.5, 2)),
        (UP, [(0.0, 1), (0.0, 2)], (0.0, 1)),
        (DOWN, [(math.inf, 1), (3.0, 2)], (3.0, 2)),
        (DOWN, [(math.nan, 1), (3.0, 2), (math.nan, 3)], (3.0, 2)),
        (DOWN, [(math.nan, 1)], (None, None)),
        (UP, [], (None, None)),
    ],
)
def test_the_best_is_the_first_of_equals(
    metric: Metric, pairs: list[tuple[float, int]], expected: tuple[float | None, int | None]
) -> None:
    assert metric.best(pairs) == expected
    assert metric.best(iter(pairs)) == expected


@given(st.sampled_from([UP, DOWN]), st.lists(st.floats(0, 1), min_size=1))
def test_nothing_is_better_than_the_best_or_worse_than_the_first(
    metric: Metric, values: list[float]
) -> None:
    best, _ = metric.best(zip(values, range(len(values)), strict=True))
    assert best is not None
    assert all(metric.gain(value, over=best) <= 0 for value in values)
    ordered = metric.worst_first(values)
    assert sorted(ordered) == sorted(values)
    assert all(metric.gain(value, over=ordered[0]) >= 0 for value in values)
    assert ordered[-1] == best


def test_the_worst_value_comes_first() -> None:
    assert UP.worst_first([0.5, 0.1, 0.9]) == [0.1, 0.5, 0.9]
    assert DOWN.worst_first([0.5, 0.1, 0.9]) == [0.9, 0.5, 0.1]


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        *((UP, value, True) for value in (0.0, 0.5, 1.0)),
        *((UP, value, False) for value in (-0.01, 1.01, 86.0, math.nan, math.inf)),
        *((DOWN, value, True) for value in (0.0, 1.0, 1e300)),
        *((DOWN, value, False) for value in (-0.01, math.nan, math.inf, -math.inf)),
    ],
)
def test_only_finite_values_in_the_range_are_possible(
    metric: Metric, value: float, expected: bool
) -> None:
    assert metric.is_possible(value) is expected


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        (UP, 0.5876, ".588"),
        (UP, 0.0, ".000"),
        (UP, 1.0, "1.000"),
        (DOWN, 0.5876, "0.588"),
        (PERPLEXITY, 12.3456, "12.346"),
        (UP, None, "–"),
        (DOWN, None, "–"),
    ],
)
def test_a_fraction_is_written_without_its_zero(
    metric: Metric, value: float | None, expected: str
) -> None:
    assert metric.text(value) == expected


def test_a_result_names_its_primary_metric() -> None:
    assert primary_metric({"metric": "loss"}) == LOSS
    assert primary_metric({}) == primary_metric({"metric": None}) == ACCURACY


def test_values_have_the_keys_of_results() -> None:
    values = {"loss": 2.0, "perplexity": 7.4}
    found = quality("global", (LOSS, PERPLEXITY), values)
    assert found == {"global_loss": 2.0, "global_perplexity": 7.4}
    assert metrics_in({**found, "initial_accuracy": 0.1}) == [LOSS, PERPLEXITY]
    assert quality("initial", (LOSS, F1), None) == {"initial_loss": None, "initial_f1": None}
    with pytest.raises(KeyError, match="f1"):
        quality("global", (LOSS, F1), values)
