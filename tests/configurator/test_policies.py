"""Policies: what they explore, and that each finds the best arm of a known problem."""

from dataclasses import replace

import numpy as np
import pytest

from droppeft.configurator.arms import Arm, Depth
from droppeft.configurator.choosing import choose_together
from droppeft.configurator.learning import Estimate, Trial
from droppeft.configurator.memory import Memory, begin, halved, with_round
from droppeft.configurator.policies import FORCED, POLICIES, Asked

SOME = Estimate(
    level=1.0,
    value=np.array([0.2, 0.0, -0.1]),
    covariance=np.diag([0.01, 0.04, 0.25]),
    noise=0.5,
    count=np.array([9, 4, 0]),
)


def scores(policy: str, devices: int, epsilon: float = 0.2, seed: int = 0) -> np.ndarray:
    return POLICIES[policy](SOME, devices, asked(epsilon, seed)).scores


def asked(
    epsilon: float = 0.2, seed: int = 0, seconds: tuple[float, ...] = (2.0, 1.0, 1.0)
) -> Asked:
    return Asked(np.array(seconds), epsilon, np.random.default_rng(seed))


def test_ucb_lets_one_device_try_the_arm_with_the_highest_bound() -> None:
    """Expected per second .6, 1.0, .9; bounds with a bonus of √ln 13 = 1.6: .68, 1.32, 1.7.

    The second is the best, the third the challenger.
    """
    found = scores("sliding_window_ucb", 4)
    tries = (found == FORCED).sum(axis=0).tolist()
    assert tries == [0, 0, 1]
    np.testing.assert_allclose(found[(found < FORCED).all(axis=1)], [[1.2, 1.0, 0.9]] * 3)


def test_ucb_tries_nothing_that_cannot_be_the_best() -> None:
    sure = replace(SOME, covariance=np.diag([0.0, 0.0, 0.0001]))
    found = POLICIES["sliding_window_ucb"](sure, 2, asked()).scores
    np.testing.assert_allclose(found, [[1.2, 1.0, 0.9]] * 2)


def test_thompson_draws_from_what_is_known() -> None:
    drawn = scores("budgeted_thompson", 20_000)
    np.testing.assert_allclose(drawn.mean(axis=0), [1.2, 1.0, 0.9], atol=0.02)
    np.testing.assert_allclose(drawn.std(axis=0), [0.1, 0.2, 0.5], rtol=0.03)


def test_greedy_explores_as_often_as_it_is_told() -> None:
    explored = (scores("epsilon_greedy", 20_000, epsilon=0.3) == FORCED).sum(axis=0)
    np.testing.assert_allclose(explored / 20_000, [0.1, 0.1, 0.1], atol=0.01)
    np.testing.assert_array_equal(scores("epsilon_greedy", 3, epsilon=0.0), [[1.2, 1.0, 0.9]] * 3)


def test_random_asks_nobody() -> None:
    found = POLICIES["uniform_random"](SOME, 30_000, asked())
    assert not found.by_cost
    share = np.bincount(found.scores.argmax(axis=1)) / 30_000
    np.testing.assert_allclose(share, [1 / 3] * 3, atol=0.01)


def test_halving_tries_what_was_tried_least() -> None:
    forced = (scores("successive_halving", 6) == FORCED).argmax(axis=1).tolist()
    # Tried 9, 4 and 0 times: the third until it meets the second, then in turn.
    assert forced[:4] == [2] * 4
    assert set(forced[4:]) == {1, 2}


# A known problem: three arms of worth 1.0, .9 and .5 that take 4, 2 and 1.9 seconds


WORTH, SECONDS = (1.0, 0.9, 0.5), (4.0, 2.0, 1.9)
ARMS = [Arm(mean, "uniform", 0.0) for mean in (0.0, 0.25, 0.5)]


def play(policy: str, seed: int, rounds: int = 60, devices: int = 5) -> list[int]:
    """Gains decay and are noisy; the arms of the last twenty rounds."""
    rng = np.random.default_rng(seed)
    memory, given = begin(ARMS, 64.0), []
    for round in range(1, rounds + 1):
        level = 0.98**round
        places = [SECONDS[number] for number in memory.numbers]
        also = Asked(np.array(places), 0.2, rng)
        scored = POLICIES[policy](memory.known(20), devices, also)
        fits = np.ones((devices, len(places)), bool)
        picked = choose_together(scored, np.tile(places, (devices, 1)), fits)
        numbers = [memory.numbers[place] for place in picked]
        trials = [
            Trial(round, number, level * (WORTH[number] + 0.4 * float(rng.normal())))
            for number in numbers
        ]
        memory = with_round(memory, trials, round, 20, None, None)
        if policy == "successive_halving":
            memory = halved(memory, round, 5, 20, places)
        given += numbers
    return given[-20 * devices :]


@pytest.mark.parametrize(
    "policy",
    ["epsilon_greedy", "sliding_window_ucb", "budgeted_thompson", "successive_halving"],
)
def test_every_policy_finds_the_arm_with_most_gain_per_second(policy: str) -> None:
    """.9 in 2 seconds; drawing at random would give it a third of the turns."""
    shares = [play(policy, seed).count(1) / 100 for seed in range(6)]
    assert np.mean(shares) > 0.5
    assert play(policy, 3) == play(policy, 3)


def test_halving_ends_with_one() -> None:
    memory = begin(ARMS, 64.0)
    memory = with_round(memory, [Trial(1, arm, WORTH[arm]) for arm in (0, 1, 2)], 1, 20, None, None)
    assert halved(memory, 2, 3, 20, SECONDS) == memory
    memory = halved(memory, 3, 3, 20, SECONDS)
    # Per second 1 / 4 < .5 / 1.9 < .9 / 2.
    assert memory.numbers == (1, 2)
    memory = halved(memory, 6, 3, 20, SECONDS[1:])
    assert memory.numbers == (1,)
    assert halved(memory, 9, 3, 20, SECONDS[1:2]) == memory


DEPTH = Depth(12, 0, 0, 0)


def learnt(memory: Memory) -> Memory:
    trials = [Trial(1, arm, WORTH[arm]) for arm in (0, 1, 2)] * 5
    return with_round(memory, trials, 1, 20, 50.0, [1.0] * 12)


def test_the_memory_survives_json() -> None:
    import json

    from droppeft.configurator.memory import as_json, from_json

    for memory in (begin(ARMS, 64.0), learnt(begin(ARMS, 64.0))):
        assert from_json(json.loads(json.dumps(as_json(memory)))) == memory


def test_importance_is_a_running_mean_of_what_is_known() -> None:
    memory = with_round(begin(ARMS, 64.0), [], 1, 20, None, None)
    assert memory.importance is None
    assert memory.row_length == 64.0
    memory = with_round(memory, [], 2, 20, 30.0, [1.0, 0.0, 2.0])
    assert (memory.importance, memory.row_length) == ((1.0, 0.0, 2.0), 30.0)
    memory = with_round(memory, [], 3, 20, 40.0, [2.0, 3.0, 0.0])
    assert memory.importance == pytest.approx((1.2, 3.0, 2.0))
    assert memory.row_length == 40.0


def test_the_worst_arm_makes_room_for_a_neighbour_of_the_best() -> None:
    from droppeft.configurator.memory import refreshed

    memory = learnt(begin(ARMS, 64.0))
    rng = np.random.default_rng(0)
    args = (20, SECONDS, 0.125, ("uniform",), DEPTH, rng)
    assert refreshed(memory, 9, 0, *args) is memory
    assert refreshed(memory, 2, 3, *args) is memory
    new = refreshed(memory, 3, 3, *args)
    assert new.numbers == (1, 2, 3)
    near = {Arm(0.125, "uniform", 0.0), Arm(0.375, "uniform", 0.0), Arm(0.25, "uniform", 1 / 12)}
    assert new.arms[3] in near
    assert (new.next_number, new.changed) == (4, 3)
    assert new.trials == memory.trials


def test_arms_that_were_not_tried_are_not_judged() -> None:
    from droppeft.configurator.memory import refreshed

    trials = [Trial(1, 1, 1.0), Trial(1, 2, 0.1)]
    memory = with_round(begin(ARMS, 64.0), trials, 1, 20, None, None)
    new = refreshed(memory, 3, 3, 20, SECONDS, 0.125, (), DEPTH, np.random.default_rng(0))
    assert new.numbers == (0, 1, 3)
