"""One arm per client, for the most reward per second of the whole round."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.bandit.choosing import choose_together
from droppeft.bandit.learning import LEAST
from droppeft.bandit.policies import FORCED, ScoredArms
from droppeft.errors import DroppeftError


def together(scores: list[list[float]], seconds: list[list[float]], **more: object) -> list[int]:
    fits = np.array(more.get("fits", np.ones(np.shape(scores), bool)))
    expected = np.array(more.get("expected", np.zeros(len(scores[0]))))
    scored = ScoredArms(np.array(scores), expected, bool(more.get("by_cost", True)))
    return list(choose_together(scored, np.array(seconds), fits))


def test_a_cohort_finishes_together() -> None:
    """Fast: whole arm 2 s, slow: whole 8 s, thin 2 s. Both whole 2 / 8; one each (1 + .6) / 2."""
    scores = [[1.0, 0.6], [1.0, 0.6]]
    assert together(scores, [[2.0, 0.5], [8.0, 2.0]]) == [0, 1]
    # Where thin gains little the slow one is waited for: 1.05 / 2 < 2 / 3.
    assert together([[1.0, 0.05]] * 2, [[2.0, 0.5], [3.0, 2.0]]) == [0, 0]


def test_a_fast_client_has_time_for_the_better_arm() -> None:
    assert together([[0.2, 1.0], [1.0, 0.9]], [[1.0, 4.0], [4.0, 4.0]]) == [1, 0]


def test_a_client_that_explores_takes_what_it_must_and_the_others_know_it() -> None:
    """The first takes 8 s whatever it gains: now the other may take the longer arm."""
    seconds = [[8.0, 1.0], [6.0, 1.0]]
    assert together([[0.1, 1.0], [1.5, 1.0]], seconds) == [1, 1]
    assert together([[FORCED, 1.0], [1.5, 1.0]], seconds) == [0, 0]
    assert together([[FORCED, 1.0], [1.0, FORCED]], seconds) == [0, 1]


def test_what_explorers_are_expected_to_yield_counts() -> None:
    """One gains 1 in 1 s anyhow: 1.5 / 1 is more than 2 / 1.9."""
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


def test_without_costs_the_best_score_is_taken() -> None:
    assert together([[0.1, 0.9]], [[1.0, 100.0]], by_cost=False) == [1]


def test_where_nothing_is_gained_the_cheapest_is_taken() -> None:
    assert together([[-1.0, -0.5], [-3.0, -9.0]], [[2.0, 1.0], [2.0, 1.0]]) == [1, 1]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10_000))
def test_it_is_the_best_of_all_choices(clients: int, arms: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.maximum(rng.normal(0.5, 0.5, (clients, arms)), LEAST)
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
