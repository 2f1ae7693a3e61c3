"""Which layers are shared: those that score lowest, and not another set every round."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.sharing.selection import count_of, select_shared, unmoved

SCORES = st.lists(st.floats(-10, 10), min_size=1, max_size=9)


@given(SCORES, st.data())
def test_so_many_are_shared_and_no_kept_one_scores_lower(
    scores: list[float], data: st.DataObject
) -> None:
    layers = sorted(data.draw(st.sets(st.sampled_from(range(len(scores))))))
    count = data.draw(st.integers(0, len(layers)))
    before = data.draw(st.none() | st.sets(st.integers(0, 12)))
    shared = select_shared(scores, layers, count, before, 0.0)
    kept = set(layers) - set(shared)
    assert len(shared) == count
    assert list(shared) == sorted(shared)
    assert set(shared) <= set(layers)
    if shared and kept:
        assert max(scores[one] for one in shared) <= min(scores[one] for one in kept)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_end_too(odd: float) -> None:
    """A turn may diverge: what it answers is refused by the server, so it must answer."""
    for scores in ([odd] * 4, [1.0, odd, 2.0, odd], [odd, 1.0, 2.0, 3.0]):
        assert len(select_shared(scores, range(4), 2, None, 0.1)) == 2
        assert len(select_shared(scores, range(4), 2, (0, 3), 0.0)) == 2


def test_layers_that_did_not_move_stay_what_they_are() -> None:
    """All begin as shared."""
    assert unmoved(range(6), (4, 5), None) == {0, 1, 2, 3}
    assert unmoved(range(6), (4, 5), (0, 3, 4)) == {0, 3}
    assert unmoved((2, 3), (), None) == {2, 3}


def test_of_equal_scores_the_lower_layers_are_shared() -> None:
    assert select_shared([1.0] * 6, range(6), 3, None, 0.0) == (0, 1, 2)
    assert select_shared([1.0] * 6, range(6), 3, (1, 4, 5), 0.0) == (1, 4, 5)


@pytest.mark.parametrize(
    ("hysteresis", "expected"),
    # Layer 0 is kept with 1.0; of the shared ones layer 3 scores 1.5: more by a half.
    [(0.0, (0, 1, 2)), (0.4, (0, 1, 2)), (0.5, (1, 2, 3)), (0.6, (1, 2, 3))],
)
def test_a_shared_layer_must_score_so_much_higher(
    hysteresis: float, expected: tuple[int, ...]
) -> None:
    assert select_shared([1.0, 0.1, 0.2, 1.5], range(4), 3, (1, 2, 3), hysteresis) == expected


def test_scores_below_nothing_have_a_margin_too() -> None:
    """By a half of one: from -1 to -0.4 is more, from -1 to -0.6 is less."""
    assert select_shared([-1.0, -0.4], range(2), 1, (1,), 0.5) == (0,)
    assert select_shared([-1.0, -0.6], range(2), 1, (1,), 0.5) == (1,)


@given(SCORES, st.floats(0, 3), st.data())
def test_the_same_scores_change_nothing_more(
    scores: list[float], hysteresis: float, data: st.DataObject
) -> None:
    layers = range(len(scores))
    count = data.draw(st.integers(0, len(scores)))
    first = select_shared(scores, layers, count, None, hysteresis)
    assert select_shared(scores, layers, count, first, hysteresis) == first


def test_another_number_keeps_the_sides_as_far_as_it_goes() -> None:
    """Of three shared ones the lowest two stay, to one the lowest kept one is added."""
    scores = [3.0, 2.0, 2.5, 2.6]
    assert select_shared(scores, range(4), 2, (0, 2, 3), 9.0) == (2, 3)
    assert select_shared(scores, range(4), 2, (0,), 9.0) == (0, 1)
    assert select_shared(scores, range(4), 2, (7,), 9.0) == (1, 2)


@pytest.mark.parametrize(
    ("fraction", "layers", "count"), [(0, 6, 0), (0.5, 6, 3), (0.5, 5, 3), (0.2, 6, 1), (1, 6, 6)]
)
def test_a_part_is_rounded_to_whole_layers(fraction: float, layers: int, count: int) -> None:
    assert count_of(fraction, layers) == count
