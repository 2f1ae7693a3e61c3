"""Which layers are shared: those that score lowest, with hysteresis."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.sharing.selection import count_of, select_shared, unchanged_shared

SCORES = st.lists(st.floats(-10, 10), min_size=1, max_size=9)


@given(SCORES, st.data())
def test_count_layers_are_shared_and_no_personal_one_scores_lower(
    scores: list[float], data: st.DataObject
) -> None:
    layers = sorted(data.draw(st.sets(st.sampled_from(range(len(scores))))))
    count = data.draw(st.integers(0, len(layers)))
    before = data.draw(st.none() | st.sets(st.integers(0, 12)))
    shared = select_shared(scores, layers, count, before, 0.0)
    personal = set(layers) - set(shared)
    assert len(shared) == count
    assert list(shared) == sorted(shared)
    assert set(shared) <= set(layers)
    if shared and personal:
        highest_shared = max(scores[layer] for layer in shared)
        assert highest_shared <= min(scores[layer] for layer in personal)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_the_choice_ends_with_scores_that_are_not_numbers(odd: float) -> None:
    """Training may diverge. The client must still reply, and the server refuses the update."""
    for scores in ([odd] * 4, [1.0, odd, 2.0, odd], [odd, 1.0, 2.0, 3.0]):
        assert len(select_shared(scores, range(4), 2, None, 0.1)) == 2
        assert len(select_shared(scores, range(4), 2, (0, 3), 0.0)) == 2


def test_layers_that_did_not_change_stay_shared_or_personal() -> None:
    """At first all layers are shared."""
    assert unchanged_shared(range(6), (4, 5), None) == {0, 1, 2, 3}
    assert unchanged_shared(range(6), (4, 5), (0, 3, 4)) == {0, 3}
    assert unchanged_shared((2, 3), (), None) == {2, 3}


def test_of_equal_scores_the_lower_layers_are_shared() -> None:
    assert select_shared([1.0] * 6, range(6), 3, None, 0.0) == (0, 1, 2)
    assert select_shared([1.0] * 6, range(6), 3, (1, 4, 5), 0.0) == (1, 4, 5)


@pytest.mark.parametrize(
    ("hysteresis", "expected"),
    # Layer 0 is personal and scores 1.0; the shared layer 3 scores 1.5, which is half as much more.
    [(0.0, (0, 1, 2)), (0.4, (0, 1, 2)), (0.5, (1, 2, 3)), (0.6, (1, 2, 3))],
)
def test_a_shared_layer_must_score_higher_by_the_hysteresis(
    hysteresis: float, expected: tuple[int, ...]
) -> None:
    assert select_shared([1.0, 0.1, 0.2, 1.5], range(4), 3, (1, 2, 3), hysteresis) == expected


def test_negative_scores_have_a_margin_too() -> None:
    """The margin is half of |-1|: -0.4 exceeds -1 by more than that, -0.6 by less."""
    assert select_shared([-1.0, -0.4], range(2), 1, (1,), 0.5) == (0,)
    assert select_shared([-1.0, -0.6], range(2), 1, (1,), 0.5) == (1,)


@given(SCORES, st.floats(0, 3), st.data())
def test_the_same_scores_give_the_same_choice(
    scores: list[float], hysteresis: float, data: st.DataObject
) -> None:
    layers = range(len(scores))
    count = data.draw(st.integers(0, len(scores)))
    first = select_shared(scores, layers, count, None, hysteresis)
    assert select_shared(scores, layers, count, first, hysteresis) == first


def test_another_count_changes_as_few_layers_as_possible() -> None:
    """Of three shared layers the lowest two stay; to one, the lowest personal layer is added."""
    scores = [3.0, 2.0, 2.5, 2.6]
    assert select_shared(scores, range(4), 2, (0, 2, 3), 9.0) == (2, 3)
    assert select_shared(scores, range(4), 2, (0,), 9.0) == (0, 1)
    assert select_shared(scores, range(4), 2, (7,), 9.0) == (1, 2)


@pytest.mark.parametrize(
    ("fraction", "layers", "count"), [(0, 6, 0), (0.5, 6, 3), (0.5, 5, 3), (0.2, 6, 1), (1, 6, 6)]
)
def test_a_fraction_is_rounded_to_whole_layers(fraction: float, layers: int, count: int) -> None:
    assert count_of(fraction, layers) == count
