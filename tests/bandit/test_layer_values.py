"""Values of layers: what changes tell about them, and how rounds add up."""

import numpy as np
import pytest

from droppeft.bandit.layer_values import FORGET, LARGEST_NORM, Changes, LayerValues, observed_values


def change(**layers: list[float]) -> Changes:
    """The change of a tensor in each of the layers, which are named l0, l1, ..."""
    return {(int(name[1:]), name): np.array(values) for name, values in layers.items()}


def test_a_layer_whose_changes_agree_is_worth_its_gradient() -> None:
    changes = [change(l0=[1, 0], l1=[1, 0]), change(l0=[2, 0], l1=[0, 3])]
    found = observed_values(changes, [(2.0, 5.0), (4.0, 5.0)], [1.0, 1.0])
    assert found == {0: pytest.approx(3.0), 1: 0.0}


def test_opposite_changes_are_worth_nothing_not_less() -> None:
    changes = [change(l0=[1, 0]), change(l0=[-1, 0])]
    assert observed_values(changes, [(1.0,), (1.0,)], [1.0, 1.0]) == {0: 0.0}


def test_each_change_is_compared_with_the_weighted_mean_of_the_others() -> None:
    """Cosines by hand: with (3, 1)/sqrt(10), with (1, 0), and with (0.75, 0.25)/.79."""
    changes = [change(l0=[1, 0]), change(l0=[1, 0]), change(l0=[0, 1])]
    found = observed_values(changes, [(1.0,)] * 3, [1.0, 3.0, 1.0])
    expected = np.mean([3 / np.sqrt(10), 1 / np.sqrt(2), 0.0])
    assert found[0] == pytest.approx(expected)


def test_one_client_cannot_decide_what_layers_are_worth() -> None:
    changes = [change(l0=[1, 0], l1=[1, 0])] * 3
    norms = [(1.0, 1.0), (1.0, 1.0), (1.0, 1e20)]
    found = observed_values(changes, norms, [1.0, 1.0, 1.0])
    assert found == {0: pytest.approx(1.0), 1: pytest.approx((1 + 1 + LARGEST_NORM) / 3)}


def test_a_layer_of_one_client_is_not_observed() -> None:
    """A tensor that was sent but not trained does not count."""
    changes = [change(l0=[1, 0], l1=[1, 1]), change(l0=[0, 0], l1=[1, 1])]
    assert observed_values(changes, [(1.0, 1.0), (0.0, 1.0)], [1.0, 1.0]).keys() == {1}


def test_the_first_round_replaces_what_was_unknown() -> None:
    known = LayerValues.unknown(3).after({0: 1.0, 1: 2.0, 2: 3.0})
    assert known.values == pytest.approx((0.5, 1.0, 1.5))
    assert known.rounds == (1, 1, 1)
    assert known.of((1, 1, 1)) == pytest.approx(1)
    assert known.of((0, 0.5, 1)) == pytest.approx(2 / 3)


def test_later_rounds_move_the_values_slowly() -> None:
    known = LayerValues.unknown(2)
    for _ in range(5):
        known = known.after({0: 1.0, 1: 1.0})
    moved = known.after({0: 0.0, 1: 7.0})
    assert moved.values == pytest.approx((1 - FORGET, 1 + FORGET))


def test_a_round_that_saw_some_layers_leaves_their_sum_to_them() -> None:
    known = LayerValues.unknown(3).after({0: 1.0, 1: 2.0, 2: 3.0})
    seen = known.after({1: 10.0, 2: 10.0})
    assert seen.values[0] == pytest.approx(0.5)
    assert seen.values[1] + seen.values[2] == pytest.approx(2.5)
    worthless = LayerValues.unknown(2).after({0: 0.0, 1: 1.0})
    assert worthless.values == (0.0, 2.0)
    assert worthless.after({0: 1.0}).values[0] > 0
    assert known.after({}) == known
    assert known.after({1: 0.0}) == known
