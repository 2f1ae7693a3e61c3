"""Schedules: factors of the rates, how often layers are dropped, and error messages."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marginals import DRAWS, assert_marginals, conditioned

from droppeft.errors import DroppeftError
from droppeft.layer_dropout import (
    SAMPLINGS,
    SCHEDULES,
    layer_rates,
    scheduled_rates,
)
from droppeft.layer_dropout.dropout import modes_of_step
from droppeft.layer_dropout.modes import Mode

RATES = st.lists(st.floats(0, 1), min_size=1, max_size=30)
SHARES = st.floats(0, 1)
PARTS = st.floats(0.001, 1)


def active_in_step(
    step: int, rates: Sequence[float], options: Any, need_one_of: Sequence[int] = ()
) -> tuple[bool, ...]:
    drawn = modes_of_step(step, rates, options, need_one_of)
    return tuple(mode is Mode.TRAIN for mode in drawn)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(rates=RATES, progress=SHARES, part=PARTS)
def test_rates_stay_probabilities_and_keep_their_proportions(
    schedule: str, rates: list[float], progress: float, part: float
) -> None:
    now = scheduled_rates(rates, schedule, progress, part)
    [factor] = scheduled_rates([1.0], schedule, progress, part)
    assert 0 <= factor <= 1
    assert now == tuple(factor * rate for rate in rates)


@given(rates=RATES, progress=SHARES, part=PARTS)
def test_constant_rates_are_the_rates(rates: list[float], progress: float, part: float) -> None:
    assert scheduled_rates(rates, "constant", progress, part) == tuple(rates)


@pytest.mark.parametrize(
    ("schedule", "part", "factors"),
    [
        ("warm_up", 0.4, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("warm_up", 1.0, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("recovery", 0.3, [1] * 7 + [0] * 3),
        ("recovery", 0.7, [1] * 3 + [0] * 7),  # 1 - 0.7 is 0.30000000000000004
        ("recovery", 0.25, [1] * 8 + [0] * 2),
        ("recovery", 1.0, [0] * 10),
    ],
)
def test_factors_of_ten_steps(schedule: str, part: float, factors: list[float]) -> None:
    found = [scheduled_rates([1.0], schedule, step / 10, part)[0] for step in range(10)]
    assert found == pytest.approx(factors)


@given(part=PARTS, steps=st.integers(1, 300))
def test_recovery_takes_its_part_of_the_steps(part: float, steps: int) -> None:
    full = [scheduled_rates([1.0], "recovery", step / steps, part) == (0,) for step in range(steps)]
    assert full == sorted(full)
    assert abs(sum(full) - part * steps) <= 1


@pytest.mark.sample("constant-5-*", "warm_up-7-*", "recovery-1-60-*")
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("schedule", "every", "step", "factor"),
    [
        ("constant", 1, 50, 1.0),
        ("constant", 5, 54, 1.0),
        ("warm_up", 1, 0, 0.0),
        ("warm_up", 1, 10, 0.25),
        ("warm_up", 1, 30, 0.75),
        ("warm_up", 1, 40, 1.0),
        ("warm_up", 1, 99, 1.0),
        ("warm_up", 7, 34, 0.7),  # drawn at step 28
        ("recovery", 1, 0, 1.0),
        ("recovery", 1, 59, 1.0),
        ("recovery", 1, 60, 0.0),
        ("recovery", 7, 62, 1.0),  # drawn at step 56
        ("recovery", 7, 63, 0.0),
    ],
)
def test_marginals_at_a_step_are_the_scheduled_rates(
    sampling: str, schedule: str, every: int, step: int, factor: float
) -> None:
    rates = layer_rates(0.5, "incremental", 8, protected={0, 7})
    run: Any = {"schedule": schedule, "schedule_part": 0.4, "total_steps": 100}
    run |= {"sampling": sampling, "every": every}
    draws = (active_in_step(step, rates, {**run, "seed": n}) for n in range(DRAWS))
    assert_marginals(draws, [factor * rate for rate in rates])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("every", [1, 3])
def test_marginals_over_a_run_are_the_rates(sampling: str, every: int) -> None:
    rates = layer_rates(0.5, "normal", 8)
    steps = range(0, every * DRAWS, every)
    options: Any = {"sampling": sampling, "every": every}
    draws = [active_in_step(step, rates, options) for step in steps]
    held = [active_in_step(step + every - 1, rates, options) for step in steps]
    assert held == draws
    assert_marginals(draws, rates)


def test_marginals_are_conditioned_on_the_scheduled_rates() -> None:
    """One of two layers has to run, at three quarters of the rates."""
    rates, needed = (0.9, 0.8, 0.6), (0, 1)
    run: Any = {"schedule": "warm_up", "schedule_part": 0.4, "total_steps": 100}
    run |= {"sampling": "bernoulli"}
    draws = [active_in_step(30, rates, {**run, "seed": n}, needed) for n in range(DRAWS)]
    now = [0.75 * rate for rate in rates]
    assert_marginals(draws, conditioned(now, needed))


@pytest.mark.parametrize(
    ("schedule", "progress", "part", "message"),
    [
        ("cosine", 0.5, 0.3, "unknown schedule 'cosine'; the schedules are constant, warm_up, rec"),
        ("constant", 1.5, 0.3, "the progress of the run is 1.5; it must lie between 0 and 1"),
        ("recovery", 0.5, 0.0, "the part of the run that recovery takes is 0.0; it must be above"),
        ("warm_up", 0.5, 30, "the part of the run that warm_up takes is 30; it must be above 0"),
    ],
)
def test_impossible_arguments_are_refused(
    schedule: str, progress: float, part: float, message: str
) -> None:
    with pytest.raises(DroppeftError, match=re.escape(message)):
        scheduled_rates([0.5], schedule, progress, part)
