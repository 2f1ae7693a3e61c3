"""The contract of every criterion, and the arithmetic of each."""

import typing
from dataclasses import replace

import numpy as np
import pytest

from droppeft.config import SharingConfig
from droppeft.sharing.criteria import (
    CRITERIA,
    LocalResult,
    Seen,
    linear_cka,
    scores_of,
    typical_norms,
)
from droppeft.training.gradients import GradientMoments

LAYERS = 4
GROWING = range(1, 5)
STATES = np.random.default_rng(3).normal(size=(8, 3))


def turn(**changes: typing.Any) -> LocalResult:
    """Layer 0 was not trained, layer 2 never ran; all else moves."""
    made = LocalResult(
        active_steps=np.array([4.0, 4.0, 0.0, 2.0]),
        gradients=GradientMoments(
            norm=np.array([0.0, 2.0, 0.0, 1.0]),
            square=np.array([0.0, 5.0, 0.0, 1.5]),
            square_of_mean=np.array([0.0, 2.0, 0.0, 0.5]),
        ),
        change=lambda: np.array([0.0, 0.8, 0.0, 0.6]),
        seen=lambda: [
            Seen(1 - place / 10, STATES, STATES * (place + 1)) for place in range(LAYERS)
        ],
        undone=lambda layers: [layer / 10 for layer in layers],
        moved=(1, 3),
        rng=np.random.default_rng(0),
    )
    return replace(made, **changes)


def test_the_configuration_knows_them_all() -> None:
    names = typing.get_args(SharingConfig.model_fields["criterion"].annotation)
    assert names == tuple(CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_only_layers_that_moved_have_a_score(name: str) -> None:
    scores = scores_of(name, turn())
    assert len(scores) == LAYERS
    assert np.isfinite(scores).all()
    assert (scores[0], scores[2]) == (0.0, 0.0)


# Derived by hand from the numbers of turn().
EXPECTED = {
    "gradient_norm": (2.0, 1.0),
    "relative_gradient_norm": (2.0, 1.0),  # nobody to compare with
    "fisher": (5.0, 1.5),
    # Of 4 steps: variance (5 - 2) 4 / 3 = 4, signal 2 - 4 / 4 = 1; of 2 steps: 2, .5 - 2 / 2 < 0.
    "gradient_snr": (0.25, 0.0),
    "weight_change": (0.2, 0.3),
    "block_influence": (0.1, 0.3),
    "cka": (0.0, 0.0),  # a multiple of the same is as like as can be
    "leave_one_out": (0.1, 0.3),
    "position": (1.0, 3.0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_are_what_the_formula_says(name: str) -> None:
    scores = scores_of(name, turn())
    assert (scores[1], scores[3]) == pytest.approx(EXPECTED[name], abs=1e-12)


def test_every_criterion_but_the_lot_has_a_number_here() -> None:
    assert EXPECTED.keys() == CRITERIA.keys() - {"random"}


def test_only_what_is_asked_for_is_run() -> None:
    def refuse(*args: object) -> typing.Any:
        raise AssertionError("nobody asked")

    quiet = turn(change=refuse, seen=refuse, undone=refuse)
    for name, criterion in CRITERIA.items():
        if criterion.runs_model == "no" and criterion.reads != "start":
            scores_of(name, quiet)
        else:
            with pytest.raises(AssertionError, match="nobody asked"):
                scores_of(name, quiet)


def test_gradients_that_agree_are_a_signal_and_others_noise() -> None:
    gradients = GradientMoments(np.ones(4), np.ones(4), np.array([0.0, 1.0, 0.0, 0.25]))
    scores = scores_of("gradient_snr", turn(gradients=gradients))
    assert scores[1] > 1e6 > scores[3]


def test_noise_scores_alike_however_often_a_layer_ran() -> None:
    """Otherwise the score would repeat the dropout profile; METHOD 4."""
    rng, found = np.random.default_rng(0), []
    for steps in (2, 4, 16):
        gradients = rng.normal(size=(4000, steps, 5)) + 0.5
        square = np.square(gradients).sum(axis=2).mean(axis=1)
        of_mean = np.square(gradients.mean(axis=1)).sum(axis=1)
        noise = (square - of_mean) * steps / (steps - 1)
        # The sums that the score is the ratio of, without the floor at 0.
        found.append(float((of_mean - noise / steps).mean() / noise.mean()))
    assert found == pytest.approx([0.25] * 3, rel=0.1)
    once = turn(active_steps=np.array([4.0, 1.0, 0.0, 2.0]))
    assert scores_of("gradient_snr", once)[1] == 0.0


def test_cka_is_one_for_the_same_and_for_a_turned_copy_and_nothing_for_others() -> None:
    """Also with fewer rows than dimensions, where the biased one is 1 for anything."""
    rng = np.random.default_rng(0)
    for rows, wide in ((60, 5), (30, 400)):
        states = rng.normal(size=(rows, wide))
        turned, _ = np.linalg.qr(rng.normal(size=(wide, wide)))
        assert linear_cka(states, states) == pytest.approx(1)
        assert linear_cka(states, 3 * states @ turned) == pytest.approx(1)
        assert abs(linear_cka(states, rng.normal(size=(rows, wide)))) < 0.2
    assert linear_cka(states, np.ones((30, 4))) == 1.0
    assert linear_cka(states[:3], states[3:6]) == 1.0


def test_the_unbiased_hsic_is_that_of_its_definition() -> None:
    """Equation 3 of arXiv:2010.15327 with matrices of ones, as it is written there."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(7, 3))

    def hsic(a: typing.Any, b: typing.Any) -> float:
        n, one = len(a), np.ones((len(a), 1))
        k, m = (s @ s.T - np.diag(np.diag(s @ s.T)) for s in (a, b))
        parts = np.trace(k @ m), (one.T @ k @ one) * (one.T @ m @ one) / (n - 1) / (n - 2)
        return float((parts[0] + parts[1] - 2 / (n - 2) * one.T @ k @ m @ one).item() / n / (n - 3))

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert linear_cka(x, y) == pytest.approx(expected)


def test_what_is_unusual_is_the_norm_through_the_typical_one() -> None:
    scores = scores_of("relative_gradient_norm", turn(typical=np.array([9.0, 4.0, 9.0, 0.5])))
    assert (scores[1], scores[3]) == (0.5, 2.0)


def test_a_layer_that_nobody_knows_counts_as_typical_as_the_others() -> None:
    scores = scores_of("relative_gradient_norm", turn(typical=np.array([0.0, 4.0, 0.0, 0.0])))
    assert (scores[1], scores[3]) == (0.5, 0.25)
    plain = scores_of("relative_gradient_norm", turn(typical=np.zeros(4)))
    assert (plain[1], plain[3]) == (2.0, 1.0)


def test_what_is_typical_is_fitted_beside_how_large_a_client_s_gradients_are() -> None:
    """A client whose gradients are ten times as large counts as any other."""
    one, ten_times = [1.0, 3.0, 0.0], [30.0, 10.0, 0.0]
    # Shares of a client's mean: 1/2 and 3/2; 3/2 and 1/2.
    assert typical_norms([one, ten_times]) == pytest.approx((1.0, 1.0, 0.0))
    assert typical_norms([one]) == pytest.approx((0.5, 1.5, 0.0))
    assert typical_norms([]) is None
    assert typical_norms([[0.0, 0.0]]) is None


def test_clients_that_trained_other_layers_are_compared_all_the_same() -> None:
    """Upper layers have larger gradients, and half of the clients train those alone."""
    rng = np.random.default_rng(0)
    typical = np.array([0.4, 0.8, 1.2, 1.6])  # 1 on average
    size = rng.uniform(0.1, 10, size=(8, 1))
    norms = size * typical
    norms[4:, :2] = 0.0
    found = typical_norms(norms.tolist())
    assert found == pytest.approx(typical, rel=1e-6)
