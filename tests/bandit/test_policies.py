"""Policies: how they explore, and that each finds the best arm of a known problem."""

import json
from dataclasses import replace

import numpy as np
import pytest

from droppeft.bandit.arms import Arm
from droppeft.bandit.bandit_memory import BanditMemory, begin, with_round
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


def scores(policy: str, clients: int) -> np.ndarray:
    return POLICIES[policy](SOME, inputs_for(clients)).scores


def inputs_for(clients: int) -> PolicyInputs:
    seconds = np.tile([2.0, 1.0, 1.0], (clients, 1))
    none, rng = np.zeros(3, bool), np.random.default_rng(0)
    return PolicyInputs(seconds, np.ones((clients, 3), bool), none, rng)


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


def test_greedy_explores_a_fifth_of_the_time() -> None:
    explored = (scores("epsilon_greedy", 20_000) == FORCED).sum(axis=0)
    np.testing.assert_allclose(explored / 20_000, [0.2 / 3] * 3, atol=0.01)


def test_random_scores_are_uniform_and_ignore_seconds() -> None:
    found = POLICIES["uniform_random"](SOME, inputs_for(30_000))
    assert not found.by_cost
    share = np.bincount(found.scores.argmax(axis=1)) / 30_000
    np.testing.assert_allclose(share, [1 / 3] * 3, atol=0.01)


def test_untried_arms_are_forced_the_slowest_arm_on_the_fastest_client() -> None:
    seconds = np.array([[8.0, 4.0, 2.0], [4.0, 2.0, 1.0], [2.0, 1.0, 0.5]])
    untried, fits = np.array([True, False, True]), np.ones((3, 3), bool)
    for policy in ("epsilon_greedy", "sliding_window_ucb", "budgeted_thompson"):
        rng = np.random.default_rng(0)
        found = score(policy, SOME, PolicyInputs(seconds, fits, untried, rng)).scores
        assert found[2, 0] == FORCED
        assert found[1, 2] == FORCED
        tight = np.array([[True] * 3, [True] * 3, [False, True, True]])
        found = score(policy, SOME, PolicyInputs(seconds, tight, untried, rng)).scores
        assert found[1, 0] == FORCED
        assert found[2, 2] == FORCED
    alone = PolicyInputs(seconds[:1], np.zeros((1, 3), bool), untried, np.random.default_rng(0))
    assert (score("budgeted_thompson", SOME, alone).scores < FORCED).all()
    random = PolicyInputs(seconds, fits, untried, np.random.default_rng(0))
    assert (score("uniform_random", SOME, random).scores < FORCED).all()


def test_no_client_is_forced_to_take_an_arm_that_does_not_fit() -> None:
    fits = np.array([[True, True, False], [True, True, False], [True, False, True]])
    for policy in ("sliding_window_ucb", "epsilon_greedy"):
        tried = set()
        for seed in range(20):
            rng = np.random.default_rng(seed)
            given = PolicyInputs(np.ones((3, 3)), fits, np.zeros(3, bool), rng)
            found = score(policy, SOME, given).scores
            tried |= {(int(client), int(arm)) for client, arm in np.argwhere(found == FORCED)}
        assert tried
        assert all(fits[client, arm] for client, arm in tried)


# A known problem: three arms with rewards 1.0, .9 and .5 that take 4, 2 and 1.9 seconds

WORTH, SECONDS = (1.0, 0.9, 0.5), (4.0, 2.0, 1.9)
ARMS = [Arm(mean) for mean in (0.0, 0.25, 0.5)]


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
    memory, given = begin(ARMS, 64.0, 4), []
    for round in range(1, rounds + 1):
        level = 0.98**round
        places = [seconds[number] for number in memory.numbers]
        times, fits = np.tile(places, (clients, 1)), np.ones((clients, len(places)), bool)
        untried = np.array([number not in memory.tried for number in memory.numbers])
        inputs = PolicyInputs(times, fits, untried, rng)
        picked = choose_together(score(policy, memory.known(), inputs), times, fits)
        numbers = [memory.numbers[place] for place in picked]
        observations = [
            Observation(round, number, level * (worth[number] + 0.3 * float(rng.normal())))
            for number in numbers
        ]
        memory = with_round(memory, observations, round, None)
        given += numbers
    return given[-20 * clients :]


@pytest.mark.parametrize(
    "policy",
    ["epsilon_greedy", "sliding_window_ucb", "budgeted_thompson"],
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
    found = score("sliding_window_ucb", unsure, PolicyInputs(np.ones((4, 3)), fits, none, rng))
    assert (found.scores == FORCED).sum(axis=0).tolist() == [0, 1, 0]
    many = PolicyInputs(np.ones((400, 3)), np.tile(fits, (100, 1)), none, rng)
    greedy = score("epsilon_greedy", SOME, many).scores
    assert (greedy == FORCED).any()
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


def learnt(memory: BanditMemory) -> BanditMemory:
    observations = [Observation(1, arm, WORTH[arm]) for arm in (0, 1, 2)] * 5
    return with_round(memory, observations, 1, 50.0)


def test_the_memory_survives_json() -> None:
    for memory in (begin(ARMS, 64.0, 4), learnt(begin(ARMS, 64.0, 4))):
        values = json.loads(json.dumps(encode_memory(memory)))
        assert decode_memory(values, BanditMemory) == memory


def test_an_arm_counts_as_tried_when_it_was_given() -> None:
    memory = with_round(begin(ARMS, 64.0, 4), [Observation(1, 0, 1.0)], 1, None, given=[2, 0])
    assert memory.tried == {0, 2}
