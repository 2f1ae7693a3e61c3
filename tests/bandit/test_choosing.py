"""Choosing one arm per client so that the reward per second of the round is largest."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.bandit.choosing import choose_together
from droppeft.bandit.learning import MIN_REWARD
from droppeft.bandit.policies import FORCED, ScoredArms
from droppeft.errors import DroppeftError


def together(scores: list[list[float]], seconds: list[list[float]], **more: object) -> list[int]:
    fits = np.array(more.get("fits", np.ones(np.shape(scores), bool)))
    expected = np.array(more.get("expected", np.zeros(len(scores[0]))))
    scored = ScoredArms(np.array(scores), expected, bool(more.get("by_cost", True)))
    return list(choose_together(scored, np.array(seconds), fits, float(more.get("least", 0))))


def test_a_cohort_finishes_together() -> None:
    """Arm 0 takes the clients 2 s and 8 s, arm 1 takes the slow one 2 s.

    Both with arm 0: 2 / 8 per second; one with each: (1 + .6) / 2.
    """
    scores = [[1.0, 0.6], [1.0, 0.6]]
    assert together(scores, [[2.0, 0.5], [8.0, 2.0]]) == [0, 1]
    # If arm 1 has little reward, it is better to wait for the slow client: 1.05 / 2 < 2 / 3.
    assert together([[1.0, 0.05]] * 2, [[2.0, 0.5], [3.0, 2.0]]) == [0, 0]


def test_a_round_is_not_cut_below_a_share_of_its_value() -> None:
    """Half of the reward in a tenth of the time is more per second, but too little for a round."""
    scores, seconds = [[1.0, 0.5]] * 3, [[5.0, 0.1], [5.0, 0.1], [9.0, 0.9]]
    assert together(scores, seconds) == [1, 1, 1]
    assert together(scores, seconds, least=0.5) == [1, 1, 1]
    assert together(scores, seconds, least=0.75) == [0, 0, 1]
    assert together(scores, seconds, least=1) == [0, 0, 0]


def test_a_fast_client_has_time_for_the_better_arm() -> None:
    assert together([[0.2, 1.0], [1.0, 0.9]], [[1.0, 4.0], [4.0, 4.0]]) == [1, 0]


def test_a_forced_arm_is_taken_and_the_others_use_its_time() -> None:
    """The first client is forced to take 8 s, so that the other may take the longer arm."""
    seconds = [[8.0, 1.0], [6.0, 1.0]]
    assert together([[0.1, 1.0], [1.5, 1.0]], seconds) == [1, 1]
    assert together([[FORCED, 1.0], [1.5, 1.0]], seconds) == [0, 0]
    assert together([[FORCED, 1.0], [1.0, FORCED]], seconds) == [0, 1]


def test_the_expected_reward_of_a_forced_arm_counts() -> None:
    """The forced client gets 1 in 1 s, and 1.5 / 1 is more than 2 / 1.9."""
    scores, seconds = [[FORCED, 0.0, 0.0], [0.0, 1.0, 0.5]], [[1.0, 9.0, 9.0], [9.0, 1.9, 1.0]]
    assert together(scores, seconds, expected=[1.0, 1.0, 0.5]) == [0, 2]
    assert together(scores, seconds, expected=[0.0, 1.0, 0.5]) == [0, 1]


def test_an_arm_that_does_not_fit_is_never_taken() -> None:
    fits = [[False, True], [True, True]]
    assert together([[9.0, 0.1], [9.0, 0.1]], [[1.0, 1.0]] * 2, fits=fits) == [1, 0]
    assert together([[FORCED, 0.1], [9.0, 0.1]], [[1.0, 1.0]] * 2, fits=fits) == [1, 0]
    assert together([[9.0, 0.1], [9.0, 0.1]], [[1.0, 1.0]] * 2, fits=fits, by_cost=False) == [1, 0]
    with pytest.raises(DroppeftError, match="no arm of the configurator fits"):
        together([[1.0]], [[1.0]], fits=[[False]])


def test_without_seconds_the_best_score_is_taken() -> None:
    assert together([[0.1, 0.9]], [[1.0, 100.0]], by_cost=False) == [1]


def test_without_positive_scores_the_fastest_arm_is_taken() -> None:
    assert together([[-1.0, -0.5], [-3.0, -9.0]], [[2.0, 1.0], [2.0, 1.0]]) == [1, 1]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10_000))
def test_the_choice_is_the_best_of_all_choices(clients: int, arms: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.maximum(rng.normal(0.5, 0.5, (clients, arms)), MIN_REWARD)
    seconds = rng.uniform(0.5, 5, (clients, arms))
    fits = rng.random((clients, arms)) < 0.8
    fits[:, 0] |= ~fits.any(axis=1)
    chosen = choose_together(ScoredArms(scores, np.zeros(arms)), seconds, fits)

    def worth(choice: tuple[int, ...]) -> float:
        places = range(clients), choice
        return float(scores[places].sum() / seconds[places].max())

    possible = [
        choice
        for choice in itertools.product(range(arms), repeat=clients)
        if fits[range(clients), choice].all()
    ]
    assert chosen in possible
    assert worth(chosen) == pytest.approx(max(map(worth, possible)))
