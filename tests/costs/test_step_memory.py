"""Memory of a step: its parts, its bounds, and the most layers that random gates run."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.costs.step_memory import CONFIDENCE, PROCESS_BYTES, most_active, step_memory
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import sample_active


def block(stored: int, trained: int = 10) -> BlockCounts:
    return BlockCounts(100, 200, stored, 4 * (1000 + trained), 1000 + trained, trained)


COUNTS = StepCounts(2, 8, (block(300), block(500), block(400)), block(70, 5), passing_bytes=90)


def test_the_parts_of_memory() -> None:
    """Three layers with 1,000 frozen and 10 trained values each; the rest has 1,000 and 5; fp32."""
    memory = step_memory(COUNTS, active=3)
    assert memory.weights == 4 * 4000
    assert memory.trained == memory.gradients == 4 * 35
    assert memory.optimizer == 8 * 35
    assert memory.stored == 300 + 500 + 400 + 70
    assert (memory.passing, memory.process) == (90, PROCESS_BYTES)
    assert memory.model == 16_000 + 4 * 4 * 35 + 1270 + 90
    assert memory.total == memory.model + PROCESS_BYTES


def test_dropped_layers_store_nothing_but_have_weights_and_moments() -> None:
    """The layers that run are taken to be the largest."""
    memory = step_memory(COUNTS, active=1)
    assert memory.stored == 500 + 70
    assert memory.gradients == 4 * 15
    assert (memory.weights, memory.optimizer) == (16_000, 8 * 35)


def test_frozen_layers_have_no_adapter_and_do_not_run() -> None:
    memory = step_memory(COUNTS, active=1, frozen=2)
    assert memory.stored == 400 + 70
    assert memory.trained == 4 * 15
    assert memory.weights == 16_000
    with pytest.raises(DroppeftError, match="2 of 1 layers"):
        step_memory(COUNTS, active=2, frozen=2)


def test_weights_that_are_not_loaded_are_not_counted() -> None:
    """A block has 1,000 frozen values, and so has the rest of the model."""
    plain = step_memory(COUNTS, active=1)
    loaded = step_memory(COUNTS, active=1, loaded=1)
    assert loaded == replace(plain, weights=4 * 2000)
    assert step_memory(COUNTS, active=1, loaded=3) == plain
    assert step_memory(COUNTS, active=1, frozen=1, loaded=2).weights == 4 * 3000


def test_the_largest_weights_are_taken_to_be_loaded() -> None:
    sizes = zip(COUNTS.blocks, (50, 70, 60), strict=True)
    counts = replace(COUNTS, blocks=tuple(replace(b, weight_bytes=size) for b, size in sizes))
    without = step_memory(counts, 1, loaded=0).weights
    assert [step_memory(counts, 1, loaded=n).weights - without for n in (1, 2)] == [30, 50]


def test_computing_cached_states_can_take_more_than_a_step() -> None:
    """The weights of two frozen layers against those of one trained layer and what it stores."""
    heavy = replace(COUNTS.blocks[2], stored_bytes=9000)
    step = step_memory(replace(COUNTS, blocks=(*COUNTS.blocks[:2], heavy)), 1, frozen=2, loaded=1)
    assert (step.weights, step.stored) == (4 * 2000, 9000 + 70)
    building = step_memory(COUNTS, 1, frozen=2, loaded=1)
    assert (building.stored, building.gradients, building.optimizer) == (0, 0, 0)
    assert (building.weights, building.trained) == (4 * 3000, 4 * 15)


@given(st.integers(0, 2), st.integers(0, 2))
def test_more_layers_never_take_less(active: int, frozen: int) -> None:
    fewer = min(active, 3 - frozen)
    less = step_memory(COUNTS, fewer, frozen)
    assert step_memory(COUNTS, min(fewer + 1, 3 - frozen), frozen).total >= less.total
    assert step_memory(COUNTS, fewer).total >= less.total
    larger = replace(COUNTS, blocks=tuple(replace(b, stored_bytes=999) for b in COUNTS.blocks))
    assert step_memory(larger, fewer, frozen).total >= less.total


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 2**32))
def test_exact_draws_never_run_more(rates: list[float], seed: int) -> None:
    rng, most = random.Random(seed), most_active(rates, "exact", 1)
    assert all(sum(sample_active(rates, "exact", rng)) <= most for _ in range(20))


def test_the_bound_of_exact_draws_is_reached() -> None:
    assert most_active([0.5] * 6, "exact", 1) == 3
    assert most_active([0.25] * 6, "exact", 1) == 5  # 1.5 dropped on average: one or two
    assert most_active([1 / 3] * 6, "exact", 100) == 4


def test_the_worst_of_many_bernoulli_steps_runs_more_layers_than_the_mean() -> None:
    """At rate .5 the worst of 30 steps runs 17 of 24 layers on average; 95 % of the clients' local
    trainings exceed that by two layers at most."""
    rates = [0.5] * 24
    assert most_active(rates, "bernoulli", 30) in (18, 19)
    assert most_active(rates, "bernoulli", 1) < most_active(rates, "bernoulli", 1000) <= 24
    rng = random.Random(0)
    bound = most_active(rates, "bernoulli", 30)
    worst = [
        max(sum(sample_active(rates, "bernoulli", rng)) for _ in range(30)) for _ in range(400)
    ]
    within = sum(count <= bound for count in worst) / len(worst)
    below = sum(count <= bound - 1 for count in worst) / len(worst)
    assert within > CONFIDENCE - 0.03 > below


def test_rates_of_zero_and_one_are_certain() -> None:
    assert most_active([0.0, 1.0, 0.0], "bernoulli", 10**9) == 2
