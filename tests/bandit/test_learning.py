"""Estimating the values of arms from rewards with a level of their round."""

import numpy as np
import pytest

from droppeft.bandit.learning import LEVEL_SD, PRIOR, ROUND_SD, Observation, estimate


def test_without_observations_the_prior_remains() -> None:
    known = estimate([], [0, 1], last=0, window=5)
    assert known.level == 1.0
    assert known.value.tolist() == [0.0, 0.0]
    # The variance of a difference from the mean of two is half of the prior variance.
    assert known.deviation == pytest.approx([PRIOR / 2**0.5] * 2)
    assert known.noise == 1.0
    assert known.count.tolist() == [0, 0]


def test_the_posterior_is_that_of_jointly_normal_rewards() -> None:
    """The same posterior from the covariance of rewards, which share round, arm and level."""
    rng = np.random.default_rng(0)
    rounds, arms = np.array([1, 1, 1, 2, 2, 3]), np.array([0, 1, 1, 0, 2, 2])
    rewards = rng.normal(1, 0.5, 6)
    observations = [
        Observation(int(r), int(a), float(x)) for r, a, x in zip(rounds, arms, rewards, strict=True)
    ]
    known = estimate(observations, [0, 1, 2], last=3, window=5)
    scaled = rewards / np.sqrt(np.mean(rewards**2))
    by_round = ROUND_SD**2 * (rounds[:, None] == rounds)
    by_arm = PRIOR**2 * (arms[:, None] == arms)
    noise = known.noise**2 * np.eye(6)
    inverse = np.linalg.inv(LEVEL_SD**2 + by_round + by_arm + noise)
    shared = PRIOR**2 * (np.arange(3)[:, None] == arms)
    value = shared @ inverse @ scaled
    differences = np.eye(3) - 1 / 3
    covariance = differences @ (PRIOR**2 * np.eye(3) - shared @ inverse @ shared.T) @ differences
    assert known.value == pytest.approx(value - value.mean(), abs=0.01)
    np.testing.assert_allclose(known.covariance, covariance, atol=0.01)
    assert known.count.tolist() == [2, 2, 2]


def test_rewards_are_compared_mainly_within_a_round() -> None:
    """Arms differ less if they were tried in different rounds than if in the same rounds."""
    known = estimate([*[Observation(1, 0, 2.0)] * 3, *[Observation(2, 1, 1.0)] * 3], [0, 1], 2, 5)
    apart = float(known.value[0] - known.value[1])
    together = [Observation(r, arm, 2.0 - arm) for r in (1, 2) for arm in (0, 1)] * 2
    within = estimate(together, [0, 1], 2, 5).value
    assert 0 < apart < float(within[0] - within[1])


def test_arms_are_compared_through_a_third_arm() -> None:
    """Arm 0 beats arm 2 in one round, arm 2 beats arm 1 in another: arm 0 is better than arm 1."""
    rounds = [
        Observation(1, 0, 2.0),
        Observation(1, 2, 1.0),
        Observation(2, 2, 2.0),
        Observation(2, 1, 1.0),
    ] * 4
    known = estimate(rounds, [0, 1], last=2, window=5)
    assert known.value[0] > 0 > known.value[1]


def test_old_rounds_are_forgotten() -> None:
    observations = [
        Observation(1, 0, 9.0),
        Observation(1, 1, 1.0),
        Observation(6, 0, 1.0),
        Observation(6, 1, 2.0),
    ]
    assert estimate(observations, [0, 1], last=6, window=6).count.tolist() == [2, 2]
    known = estimate(observations, [0, 1], last=6, window=5)
    assert known.count.tolist() == [1, 1]
    assert known.value[1] > known.value[0]


def test_the_unit_of_rewards_does_not_matter() -> None:
    observations = [Observation(1, 0, 3.0), Observation(1, 1, 1.0), Observation(2, 1, -2.0)]
    small = [Observation(each.round, each.arm, each.reward / 1000) for each in observations]
    first, second = (estimate(some, [0, 1], last=2, window=5) for some in (observations, small))
    assert first.value == pytest.approx(second.value)
    assert first.level == pytest.approx(second.level)


def test_rewards_of_zero_are_no_error() -> None:
    known = estimate([Observation(1, 0, 0.0), Observation(1, 1, 0.0)], [0, 1], last=1, window=5)
    assert known.quality.tolist() == [0.0, 0.0]


def test_one_extreme_reward_does_not_decide() -> None:
    """Arm 2 is the worst, but one client reports a reward of a million for it."""
    observations = [
        Observation(r, arm, (0.1, 0.05, 0.01)[arm]) for r in range(10) for arm in (0, 1, 2)
    ]
    known = estimate([*observations, Observation(9, 2, 1e6)], [0, 1, 2], last=9, window=10)
    assert int(known.value.argmax()) == 0


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_few_observations_leave_the_noise_large(rounds: int) -> None:
    """Even if these observations agree with each other."""
    observations = [Observation(r, arm, 1.0 - 0.5 * arm) for r in range(rounds) for arm in (0, 1)]
    known = estimate(observations, [0, 1], last=rounds, window=10)
    assert known.noise > 0.7


@pytest.mark.parametrize("seed", range(5))
def test_the_best_arm_is_found_despite_noise_and_levels(seed: int) -> None:
    """Values .2, 0 and −.2 of the typical reward, noise .5, levels that decay from 1 to .1."""
    rng = np.random.default_rng(seed)
    worth = [0.2, 0.0, -0.2]
    observations = [
        Observation(round, arm, float(level * (1 + worth[arm] + 0.5 * rng.normal())))
        for round, level in enumerate(np.geomspace(1, 0.5, 40))
        for arm in rng.integers(3, size=6).tolist()
    ]
    known = estimate(observations, [0, 1, 2], last=39, window=40)
    assert int(known.value.argmax()) == 0
    assert int(known.value.argmin()) == 2
    assert known.deviation.max() < 0.15
    assert known.noise == pytest.approx(0.5, abs=0.1)


def test_the_level_is_the_reward_of_an_arm_of_mean_value() -> None:
    """Each round has three rewards of the good arm and one of the bad: the mean reward is 2.5."""
    observations = [
        Observation(round, arm, 3.0 - 2 * (arm == 1)) for round in range(40) for arm in (0, 0, 0, 1)
    ]
    known = estimate(observations, [0, 1], last=39, window=40)
    unit = np.sqrt((3 * 9 + 1) / 4)
    assert known.level * unit == pytest.approx(2.0, abs=0.05)
    assert known.quality * unit == pytest.approx([3.0, 1.0], abs=0.08)
