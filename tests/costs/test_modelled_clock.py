"""The modelled clock against numbers computed by hand, and properties for any numbers."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.clock_calibration.run import calibrated
from droppeft.config import Bandwidth, DeviceProfile
from droppeft.costs.device_profiles import Fleet
from droppeft.costs.modelled_clock import (
    Arithmetic,
    Clock,
    compute_seconds,
    energy_joules,
    reward_flops,
    training_flops,
)
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.errors import DroppeftError
from droppeft.messages.reply import CachedLayersCost, MeasuredCost
from handmade import ARITHMETIC, BACKWARD, COST, FORWARD, LAYERS, REST, instruction_for, update_for

PROFILE = DeviceProfile(
    effective_flops_per_s=1e12,
    step_overhead_s=0.5,
    memory_bytes=8e9,
    idle_watts=3.0,
    train_watts=15.0,
    download=Bandwidth(mean=9.0),
    upload=Bandwidth(mean=6.0),
)
CLOCK = Clock(Fleet(0, ("mine",) * 10, {"mine": PROFILE}), lambda spec: ARITHMETIC)

token_counts = st.tuples(*[st.integers(0, 64)] * LAYERS)


def cost_with(layer_tokens: Sequence[int]) -> MeasuredCost:
    return replace(COST, layer_tokens=tuple(layer_tokens))


# A local training, by hand


def test_seconds_are_work_over_speed_and_an_overhead_per_step() -> None:
    assert compute_seconds(PROFILE, 3e12, steps=4) == 3.0 + 4 * 0.5
    assert compute_seconds(PROFILE, 3e12) == 3.0


def test_energy_is_full_power_when_computing_and_idle_power_when_transferring() -> None:
    assert energy_joules(PROFILE, computing_s=10.0, waiting_s=4.0) == 150.0 + 12.0


def test_a_layer_counts_for_the_tokens_that_it_computed() -> None:
    # 64 tokens through the rest, 64 + 32 + 32 + 64 through layers.
    expected = 64 * 2 * REST + 192 * (FORWARD + BACKWARD)
    assert training_flops(ARITHMETIC, COST) == pytest.approx(expected)


def test_a_local_training_by_hand() -> None:
    instruction = instruction_for(4)
    cost = CLOCK.client_cost(
        instruction, update_for(instruction, cost=replace(COST, reward_tokens=128))
    )
    assert cost.profile == "mine"
    assert cost.download_s == pytest.approx(36 / 9)  # nine values of 4 bytes
    assert cost.upload_s == pytest.approx(36 / 6)
    # (64 x 20 + 192 x 3) x 1e9 FLOPs at 1e12 per second, and two steps.
    assert cost.train_s == pytest.approx(1.856 + 2 * 0.5)
    assert cost.reward_s == pytest.approx(128 * (4 + 10) * 1e9 / 1e12)
    assert cost.total_s == pytest.approx(4 + 6 + 2.856 + 1.792)
    assert cost.energy_j == pytest.approx(15 * (2.856 + 1.792) + 3 * (4 + 6))


def test_no_reward_costs_nothing() -> None:
    assert reward_flops(ARITHMETIC, COST) == 0


def test_scoring_layers_costs_the_forwards_that_it_takes() -> None:
    cost = replace(COST, reward_tokens=128, scoring_tokens=64)
    assert reward_flops(ARITHMETIC, cost) == pytest.approx((128 + 64) * (LAYERS * FORWARD + REST))


def test_frozen_layers_run_forward_only_and_for_new_rows_only() -> None:
    cached = replace(COST, layer_tokens=(0, 0, 32, 64))
    built = replace(cached, cached_layers=CachedLayersCost(hits=4, built=4, built_tokens=20))
    trained = 64 * 2 * REST + 96 * (FORWARD + BACKWARD)
    assert training_flops(ARITHMETIC, cached, frozen=2) == pytest.approx(trained)
    first = trained + 20 * 2 * FORWARD
    assert training_flops(ARITHMETIC, built, frozen=2) == pytest.approx(first)
    computed = replace(cached, forward_tokens=(64, 64, 0, 0))
    every_step = trained + 64 * 2 * FORWARD
    assert training_flops(ARITHMETIC, computed, frozen=2) == pytest.approx(every_step)


def test_a_layer_costs_its_forward_where_it_is_not_trained() -> None:
    cost = replace(COST, layer_tokens=(16, 32, 64, 64), forward_tokens=(48, 32, 0, 0))
    work = 64 * 2 * REST + 176 * (FORWARD + BACKWARD) + 80 * FORWARD
    assert training_flops(ARITHMETIC, cost) == pytest.approx(work)


def test_a_local_training_that_ran_no_layer_has_no_negative_cost() -> None:
    block = BlockCounts(6, 6, 0, 0, 0, 0)
    counts = StepCounts(1, 1, (block,) * LAYERS, BlockCounts(1, -4, 0, 0, 0, 0), 0)
    assert training_flops(Arithmetic((counts,)), cost_with([0] * LAYERS)) == 0


# Arithmetic between the counted lengths


def quadratic(batch: int, length: int) -> StepCounts:
    """Per row: forward 7 S^2 + 5 S + 3, backward twice that; nothing else."""
    forward = batch * (7 * length**2 + 5 * length + 3)
    part = BlockCounts(forward, 2 * forward, 0, 0, 0, 0)
    return StepCounts(batch, length, (part,), part, 0)


@given(
    st.lists(st.integers(1, 512), min_size=3, max_size=3, unique=True),
    st.integers(1, 64),
    st.integers(1, 1024),
)
def test_three_lengths_give_every_other(lengths: list[int], batch: int, length: int) -> None:
    arithmetic = Arithmetic(tuple(quadratic(batch, counted) for counted in lengths))
    row = 7 * length**2 + 5 * length + 3
    (layer,), rest = arithmetic.training(length)
    assert layer == pytest.approx(3 * row, rel=1e-6)
    assert rest == pytest.approx(3 * row, rel=1e-6)
    assert arithmetic.forward(length)[1] == pytest.approx(row, rel=1e-6)


# Properties of any local training


@given(token_counts, st.integers(0, LAYERS - 1), st.integers(1, 100))
def test_more_tokens_in_a_layer_take_longer(tokens: tuple[int, ...], layer: int, more: int) -> None:
    longer = [count + more * (index == layer) for index, count in enumerate(tokens)]
    before, after = (training_flops(ARITHMETIC, cost_with(each)) for each in (tokens, longer))
    assert after - before == pytest.approx(more * (FORWARD + BACKWARD), rel=1e-6)


@given(token_counts, token_counts)
def test_layers_add_up(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    both = [a + b for a, b in zip(one, other, strict=True)]
    none, first, second, sum_ = (
        training_flops(ARITHMETIC, cost_with(each)) for each in ((0,) * LAYERS, one, other, both)
    )
    assert (first - none) + (second - none) == pytest.approx(sum_ - none, rel=1e-6, abs=1)


# Calibration


@given(st.floats(1e9, 1e15), st.floats(0, 2), st.lists(st.floats(1e9, 1e15), min_size=3))
def test_speed_and_overhead_are_recovered_from_exact_step_times(
    speed: float, overhead: float, flops: list[float]
) -> None:
    flops = [*flops, 1e9, 1e15]
    seconds = [overhead + work / speed for work in flops]
    found_speed, found_overhead = calibrated(flops, seconds)
    for work, took in zip(flops, seconds, strict=True):
        assert found_overhead + work / found_speed == pytest.approx(took, rel=1e-3)


def test_an_overhead_is_never_negative() -> None:
    # The line through these is 2x - 1: the nearest line through 0 is wanted instead,
    # 1/speed = (sum x/y) / (sum (x/y)^2) with x/y = 1, 2/3, 3/5.
    speed, overhead = calibrated([1.0, 2.0, 3.0], [1.0, 3.0, 5.0])
    assert overhead == 0
    assert 1 / speed == pytest.approx((1 + 2 / 3 + 3 / 5) / (1 + 4 / 9 + 9 / 25))


@pytest.mark.parametrize(("flops", "seconds"), [([1.0, 2.0], [2.0, 1.0])])
def test_times_that_fall_with_the_flops_are_refused(
    flops: list[float], seconds: list[float]
) -> None:
    with pytest.raises(DroppeftError, match="do not grow with the FLOPs"):
        calibrated(flops, seconds)


def test_the_clock_works_without_torch() -> None:
    code = "import sys, droppeft.costs.modelled_clock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
