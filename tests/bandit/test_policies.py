"""Policies: how they explore, and that each finds the best arm of a known problem."""

import json
from dataclasses import replace

import numpy as np
import pytest

from droppeft.bandit.arms import Arm
from droppeft.bandit.bandit_memory import BanditMemory, begin, halved, refreshed, with_round
from droppeft.bandit.choosing import choose_together
from droppeft.bandit.learning import Estimate, Observation
from droppeft.bandit.policies import FORCED, POLICIES, PolicyInputs, score
from droppeft.runs.method_memory import decode_memory, encode_memory

SOME = Estimate(
    level=1.0,
    value=np.array([0.2, 0.0, -0.1]),
    covariance=np.diag([0.01, 0.04, 0.25]),
    noise=0.5,
    count=np.array([9, 4, 0]),
)


def scores(policy: str, clients: int, epsilon: float = 0.2, seed: int = 0) -> np.ndarray:
    return POLICIES[policy](SOME, inputs_for(clients, epsilon, seed)).scores


def inputs_for(clients: int, epsilon: float = 0.2, seed: int = 0) -> PolicyInputs:
    seconds = np.tile([2.0, 1.0, 1.0], (clients, 1))
    none, rng = np.zeros(3, bool), np.random.default_rng(seed)
    return PolicyInputs(seconds, np.ones((clients, 3), bool), none, epsilon, rng)


def test_ucb_lets_one_client_try_the_arm_with_the_highest_bound() -> None:
    """Rewards per second .6, 1.0, .9; with a bonus of √ln 13 = 1.6 the bounds are .68, 1.32, 1.7.

    The second arm is the best, the third is the challenger.
    """
    found = scores("sliding_window_ucb", 4)
    tries = (found == FORCED).sum(axis=0).tolist()
    assert tries == [0, 0, 1]
    np.testing.assert_allclose(found[(found < FORCED).all(axis=1)], [[1.2, 1.0, 0.9]] * 3)


def test_ucb_tries_nothing_that_cannot_be_the_best() -> None:
    sure = replace(SOME, covariance=np.diag([0.0, 0.0, 0.0001]))
    found = POLICIES["sliding_window_ucb"](sure, inputs_for(2)).scores
    np.testing.assert_allclose(found, [[1.2, 1.0, 0.9]] * 2)


def test_thompson_draws_from_the_posterior() -> None:
    drawn = scores("budgeted_thompson", 20_000)
    np.testing.assert_allclose(drawn.mean(axis=0), [1.2, 1.0, 0.9], atol=0.02)
    np.testing.assert_allclose(drawn.std(axis=0), [0.1, 0.2, 0.5], rtol=0.03)


def test_greedy_explores_with_probability_epsilon() -> None:
    explored = (scores("epsilon_greedy", 20_000, epsilon=0.3) == FORCED).sum(axis=0)
    np.testing.assert_allclose(explored / 20_000, [0.1, 0.1, 0.1], atol=0.01)
    np.testing.assert_array_equal(scores("epsilon_greedy", 3, epsilon=0.0), [[1.2, 1.0, 0.9]] * 3)


def test_random_scores_are_uniform_and_ignore_seconds() -> None:
    found = POLICIES["uniform_random"](SOME, inputs_for(30_000))
    assert not found.by_cost
    share = np.bincount(found.scores.argmax(axis=1)) / 30_000
    np.testing.assert_allclose(share, [1 / 3] * 3, atol=0.01)


def test_halving_tries_the_least_tried_arms() -> None:
    forced = (scores("successive_halving", 6) == FORCED).argmax(axis=1).tolist()
    # Tried 9, 4 and 0 times: the third arm until it has as many as the second, then either.
    assert forced[:4] == [2] * 4
    assert set(forced[4:]) == {1, 2}


def test_untried_arms_are_forced_the_slowest_arm_on_the_fastest_client() -> None:
    seconds = np.array([[8.0, 4.0, 2.0], [4.0, 2.0, 1.0], [2.0, 1.0, 0.5]])
    untried, fits = np.array([True, False, True]), np.ones((3, 3), bool)
    for policy in ("epsilon_greedy", "sliding_window_ucb", "budgeted_thompson"):
        rng = np.random.default_rng(0)
        found = score(policy, SOME, PolicyInputs(seconds, fits, untried, 0.0, rng)).scores
        assert found[2, 0] == FORCED
        assert found[1, 2] == FORCED
        tight = np.array([[True] * 3, [True] * 3, [False, True, True]])
        found = score(policy, SOME, PolicyInputs(seconds, tight, untried, 0.0, rng)).scores
        assert found[1, 0] == FORCED
        assert found[2, 2] == FORCED
    alone = PolicyInputs(
        seconds[:1], np.zeros((1, 3), bool), untried, 0.0, np.random.default_rng(0)
    )
    assert (score("epsilon_greedy", SOME, alone).scores < FORCED).all()
    random = PolicyInputs(seconds, fits, untried, 0.0, np.random.default_rng(0))
    assert (score("uniform_random", SOME, random).scores < FORCED).all()


def test_no_client_is_forced_to_take_an_arm_that_does_not_fit() -> None:
    fits = np.array([[True, True, False], [True, True, False], [True, False, True]])
    for policy in ("sliding_window_ucb", "successive_halving"):
        tried = set()
        for seed in range(20):
            rng = np.random.default_rng(seed)
            given = PolicyInputs(np.ones((3, 3)), fits, np.zeros(3, bool), 0.0, rng)
            found = score(policy, SOME, given).scores
            tried |= {(int(client), int(arm)) for client, arm in np.argwhere(found == FORCED)}
        assert tried
        assert all(fits[client, arm] for client, arm in tried)


# A known problem: three arms with rewards 1.0, .9 and .5 that take 4, 2 and 1.9 seconds

WORTH, SECONDS = (1.0, 0.9, 0.5), (4.0, 2.0, 1.9)
ARMS = [Arm(mean, "uniform", 0.0) for mean in (0.0, 0.25, 0.5)]


def last_arms(
    policy: str,
    seed: int,
    rounds: int = 60,
    clients: int = 5,
    seconds: tuple[float, ...] = SECONDS,
    worth: tuple[float, ...] = WORTH,
) -> list[int]:
    """Arms of the last twenty rounds, where rewards decay and are noisy."""
    rng = np.random.default_rng(seed)
    memory, given = begin(ARMS, 64.0), []
    for round in range(1, rounds + 1):
        level = 0.98**round
        places = [seconds[number] for number in memory.numbers]
        times, fits = np.tile(places, (clients, 1)), np.ones((clients, len(places)), bool)
        untried = np.array([number not in memory.tried for number in memory.numbers])
        inputs = PolicyInputs(times, fits, untried, 0.2, rng)
        picked = choose_together(score(policy, memory.known(20), inputs), times, fits)
        numbers = [memory.numbers[place] for place in picked]
        observations = [
            Observation(round, number, level * (worth[number] + 0.3 * float(rng.normal())))
            for number in numbers
        ]
        memory = with_round(memory, observations, round, 20, None, None)
        if policy == "successive_halving":
            memory = halved(memory, round, 5, 20, places)
        given += numbers
    return given[-20 * clients :]


@pytest.mark.parametrize(
    "policy",
    ["epsilon_greedy", "sliding_window_ucb", "budgeted_thompson", "successive_halving"],
)
def test_every_policy_finds_the_arm_with_most_reward_per_second(policy: str) -> None:
    """The best arm has .9 in 2 seconds; random choice would take it in a third of all cases."""
    shares = [last_arms(policy, seed).count(1) / 100 for seed in range(6)]
    assert np.mean(shares) > 0.5
    assert last_arms(policy, 3) == last_arms(policy, 3)


def test_an_arm_that_fits_no_client_is_no_challenger() -> None:
    """Otherwise it would be the challenger of every round, since it has no observations."""
    fits = np.tile([True, True, False], (4, 1))
    rng, none = np.random.default_rng(0), np.zeros(3, bool)
    unsure = replace(SOME, covariance=np.diag([1.0, 1.0, 4.0]))
    found = score("sliding_window_ucb", unsure, PolicyInputs(np.ones((4, 3)), fits, none, 0.0, rng))
    assert (found.scores == FORCED).sum(axis=0).tolist() == [0, 1, 0]
    greedy = score(
        "epsilon_greedy", SOME, PolicyInputs(np.ones((4, 3)), fits, none, 1.0, rng)
    ).scores
    assert (greedy == FORCED).any(axis=1).all()
    assert not (greedy[:, 2] == FORCED).any()


@pytest.mark.parametrize("policy", ["sliding_window_ucb", "budgeted_thompson"])
@pytest.mark.parametrize(
    ("seconds", "worth"), [((3.0, 1.5, 1.0), (1.0, 0.15, 0.1)), ((1.9, 1.4, 1.0), (1.0, 0.6, 0.3))]
)
def test_a_slow_arm_that_is_the_best_is_found(
    policy: str, seconds: tuple[float, ...], worth: tuple[float, ...]
) -> None:
    """By the prior alone, no client would try it."""
    shares = [
        last_arms(policy, seed, 40, seconds=seconds, worth=worth).count(0) / 100
        for seed in range(6)
    ]
    assert np.mean(shares) > 0.5


def test_halving_ends_with_one_arm() -> None:
    memory = begin(ARMS, 64.0)
    memory = with_round(
        memory, [Observation(1, arm, WORTH[arm]) for arm in (0, 1, 2)], 1, 20, None, None
    )
    assert halved(memory, 2, 3, 20, SECONDS) == memory
    memory = halved(memory, 3, 3, 20, SECONDS)
    # Per second 1 / 4 < .5 / 1.9 < .9 / 2.
    assert memory.numbers == (1, 2)
    memory = halved(memory, 6, 3, 20, SECONDS[1:])
    assert memory.numbers == (1,)
    assert halved(memory, 9, 3, 20, SECONDS[1:2]) == memory


def near(arm: Arm) -> list[Arm]:
    return [Arm(arm.mean + change, "uniform", 0.0) for change in (-0.125, 0.125)]


def learnt(memory: BanditMemory) -> BanditMemory:
    observations = [Observation(1, arm, WORTH[arm]) for arm in (0, 1, 2)] * 5
    return with_round(memory, observations, 1, 20, 50.0, [1.0] * 12)


def test_the_memory_survives_json() -> None:
    for memory in (begin(ARMS, 64.0), learnt(begin(ARMS, 64.0))):
        values = json.loads(json.dumps(encode_memory(memory)))
        assert decode_memory(values, BanditMemory) == memory


def test_importance_is_a_running_mean_of_known_values() -> None:
    memory = with_round(begin(ARMS, 64.0), [], 1, 20, None, None)
    assert memory.importance is None
    assert memory.row_length == 64.0
    memory = with_round(memory, [], 2, 20, 30.0, [1.0, 0.0, 2.0])
    assert (memory.importance, memory.row_length) == ((1.0, 0.0, 2.0), 30.0)
    memory = with_round(memory, [], 3, 20, 40.0, [2.0, 3.0, 0.0])
    assert memory.importance == pytest.approx((1.2, 3.0, 2.0))
    assert memory.row_length == 40.0


def test_the_worst_arm_is_replaced_by_a_neighbour_of_the_best() -> None:
    memory = learnt(begin(ARMS, 64.0))
    rng = np.random.default_rng(0)
    args = (20, SECONDS, near, rng)
    assert refreshed(memory, 9, 0, *args) is memory
    assert refreshed(memory, 2, 3, *args) is memory
    new = refreshed(memory, 3, 3, *args)
    assert new.numbers == (1, 2, 3)
    assert new.arms[3] in near(ARMS[1])
    assert refreshed(memory, 3, 3, 20, SECONDS, lambda arm: [], rng).numbers == (0, 1, 2)
    assert (new.next_number, new.changed) == (4, 3)
    assert new.observations == memory.observations


def test_without_positive_rewards_the_slowest_arms_are_removed_first() -> None:
    observations = [Observation(round, arm, -0.01) for round in (1, 2) for arm in (0, 1, 2)]
    memory = with_round(begin(ARMS, 64.0), observations, 2, 20, None, None)
    assert halved(memory, 3, 3, 20, (4.0, 2.0, 1.0)).numbers == (1, 2)


def test_halving_removes_no_arm_that_a_profile_needs() -> None:
    """Only the best arm fits one device profile, and only the worst arm fits another."""
    four = [*ARMS, Arm(0.125, "uniform", 0.0)]
    observations = [
        Observation(1, arm, reward) for arm, reward in enumerate((1.0, 0.5, 0.25, 0.1))
    ] * 2
    memory = with_round(begin(four, 64.0), observations, 1, 20, None, None)
    left = halved(memory, 3, 3, 20, (1.0,) * 4, lambda numbers: {0, 3} <= set(numbers))
    assert left.numbers == (0, 1, 3)
    assert left.changed == 3


def test_an_arm_counts_as_tried_when_it_was_given() -> None:
    memory = with_round(
        begin(ARMS, 64.0), [Observation(1, 0, 1.0)], 1, 20, None, None, given=[2, 0]
    )
    assert memory.tried == {0, 2}


def test_halving_does_not_remove_untried_arms() -> None:
    observations = [Observation(1, 1, 1.0), Observation(1, 2, 0.1)]
    memory = with_round(begin(ARMS, 64.0), observations, 1, 20, None, None)
    assert halved(memory, 3, 3, 20, SECONDS).numbers == (0, 1)


def test_untried_arms_are_not_replaced() -> None:
    observations = [Observation(1, 1, 1.0), Observation(1, 2, 0.1)]
    memory = with_round(begin(ARMS, 64.0), observations, 1, 20, None, None)
    new = refreshed(memory, 3, 3, 20, SECONDS, near, np.random.default_rng(0))
    assert new.numbers == (0, 1, 3)
