"""What arms are worth, from gains that share their round's level."""

import numpy as np
import pytest

from droppeft.configurator.learning import PRIOR, Trial, estimate


def test_nothing_is_known_at_first() -> None:
    known = estimate([], [0, 1], last=0, window=5)
    assert known.level == 1.0
    assert known.value.tolist() == [0.0, 0.0]
    # Of a difference from the mean of two: half of it is known.
    assert known.deviation == pytest.approx([PRIOR / 2**0.5] * 2)
    assert known.noise == 1.0
    assert known.count.tolist() == [0, 0]


def test_two_arms_in_one_round_by_hand() -> None:
    """Gains 3 and 1: root mean square √5, level 2/√5. Within the round ±1/√5 with design ±1/2.

    With noise 1 and prior .5 the precision is [[.5, -.5], [-.5, .5]] + 4·1, whose inverse times
    (1/√5)·(1, -1) is (1/√5)/5 · (1, -1).
    """
    known = estimate([Trial(1, 0, 3.0), Trial(1, 1, 1.0)], [0, 1], last=1, window=5)
    assert known.level == pytest.approx(2 / 5**0.5)
    assert known.covariance == pytest.approx(np.array([[0.1, -0.1], [-0.1, 0.1]]))
    assert known.value == pytest.approx([1 / 5**1.5, -1 / 5**1.5])
    assert known.quality == pytest.approx(known.level + known.value)
    assert known.count.tolist() == [1, 1]


def test_a_level_of_a_round_says_nothing_of_its_arms() -> None:
    """Arm 0 was only tried in a good round, arm 1 only in a bad one."""
    good = [Trial(1, 0, 10.0)] * 3
    bad = [Trial(2, 1, 1.0)] * 3
    known = estimate(good + bad, [0, 1], last=2, window=5)
    assert known.value == pytest.approx([0.0, 0.0])


def test_arms_meet_over_a_third() -> None:
    """0 beats 2 in one round, 2 beats 1 in another: so 0 is better than 1."""
    rounds = [Trial(1, 0, 2.0), Trial(1, 2, 1.0), Trial(2, 2, 2.0), Trial(2, 1, 1.0)] * 4
    known = estimate(rounds, [0, 1], last=2, window=5)
    assert known.value[0] > 0 > known.value[1]


def test_old_rounds_are_forgotten() -> None:
    trials = [Trial(1, 0, 9.0), Trial(1, 1, 1.0), Trial(6, 0, 1.0), Trial(6, 1, 2.0)]
    assert estimate(trials, [0, 1], last=6, window=6).count.tolist() == [2, 2]
    known = estimate(trials, [0, 1], last=6, window=5)
    assert known.count.tolist() == [1, 1]
    assert known.value[1] > known.value[0]


def test_the_unit_does_not_matter() -> None:
    trials = [Trial(1, 0, 3.0), Trial(1, 1, 1.0), Trial(2, 1, -2.0)]
    small = [Trial(one.round, one.arm, one.gain / 1000) for one in trials]
    first, second = (estimate(some, [0, 1], last=2, window=5) for some in (trials, small))
    assert first.value == pytest.approx(second.value)
    assert first.level == pytest.approx(second.level)


def test_no_gain_at_all_is_no_error() -> None:
    known = estimate([Trial(1, 0, 0.0), Trial(1, 1, 0.0)], [0, 1], last=1, window=5)
    assert known.quality.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_better_arm_is_found_through_noise_and_levels(seed: int) -> None:
    """Values .2, 0 and −.2 of the typical gain, noise .5, levels that decay from 1 to .1."""
    rng = np.random.default_rng(seed)
    worth = [0.2, 0.0, -0.2]
    trials = [
        Trial(round, arm, float(level * (1 + worth[arm] + 0.5 * rng.normal())))
        for round, level in enumerate(np.geomspace(1, 0.5, 40))
        for arm in rng.integers(3, size=6).tolist()
    ]
    known = estimate(trials, [0, 1, 2], last=39, window=40)
    assert int(known.value.argmax()) == 0
    assert int(known.value.argmin()) == 2
    assert known.deviation.max() < 0.15
    assert known.noise == pytest.approx(0.5, abs=0.1)


def test_the_level_is_that_of_an_arm_of_mean_worth() -> None:
    """Three turns of the good arm, one of the bad one in every round: the mean gain is 2.5."""
    trials = [
        Trial(round, arm, 3.0 - 2 * (arm == 1)) for round in range(40) for arm in (0, 0, 0, 1)
    ]
    known = estimate(trials, [0, 1], last=39, window=40)
    unit = np.sqrt((3 * 9 + 1) / 4)
    assert known.level * unit == pytest.approx(2.0, abs=0.02)
    assert known.quality * unit == pytest.approx([3.0, 1.0], abs=0.03)
