"""What all criteria have in common, and the arithmetic of each."""

import typing
from dataclasses import replace

import numpy as np
import pytest

from droppeft.config import SharingConfig
from droppeft.sharing.criteria import (
    CRITERIA,
    BlockStates,
    LocalResult,
    linear_cka,
    scores_of,
    typical_norms,
)
from droppeft.training.gradients import GradientMoments

LAYERS = 4
GROWING = range(1, 5)
STATES = np.random.default_rng(3).normal(size=(8, 3))


def local_result(**changes: typing.Any) -> LocalResult:
    """A result in which layer 0 was not trained and layer 2 never ran; layers 1 and 3 changed."""
    result = LocalResult(
        active_steps=np.array([4.0, 4.0, 0.0, 2.0]),
        gradients=GradientMoments(
            norm=np.array([0.0, 2.0, 0.0, 1.0]),
            square=np.array([0.0, 5.0, 0.0, 1.5]),
        ),
        block_states=lambda: [
            BlockStates(1 - layer / 10, STATES, STATES * (layer + 1)) for layer in range(LAYERS)
        ],
        loss_increases=lambda layers: [layer / 10 for layer in layers],
        changed_layers=(1, 3),
        rng=np.random.default_rng(0),
    )
    return replace(result, **changes)


def test_the_configuration_has_the_names_of_all_criteria() -> None:
    names = typing.get_args(SharingConfig.model_fields["criterion"].annotation)
    assert names == tuple(CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_only_layers_that_changed_have_a_score(name: str) -> None:
    scores = scores_of(name, local_result())
    assert len(scores) == LAYERS
    assert np.isfinite(scores).all()
    assert (scores[0], scores[2]) == (0.0, 0.0)


# Derived by hand from the numbers of local_result().
EXPECTED = {
    "gradient_norm": (2.0, 1.0),
    "relative_gradient_norm": (2.0, 1.0),  # no other clients to compare with
    "fisher": (5.0, 1.5),
    "block_influence": (0.1, 0.3),
    "cka": (0.0, 0.0),  # CKA is 1 for a multiple of the same states
    "leave_one_out": (0.1, 0.3),
    "position": (1.0, 3.0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_are_what_the_formula_says(name: str) -> None:
    scores = scores_of(name, local_result())
    assert (scores[1], scores[3]) == pytest.approx(EXPECTED[name], abs=1e-12)


def test_every_criterion_but_random_has_an_expected_score() -> None:
    assert EXPECTED.keys() == CRITERIA.keys() - {"random"}


def test_criteria_call_only_the_functions_that_they_need() -> None:
    def refuse(*args: object) -> typing.Any:
        raise AssertionError("must not be called")

    quiet = local_result(block_states=refuse, loss_increases=refuse)
    for name, criterion in CRITERIA.items():
        if criterion.runs_model == "no" and not criterion.needs_start:
            scores_of(name, quiet)
        else:
            with pytest.raises(AssertionError, match="must not be called"):
                scores_of(name, quiet)


def test_cka_is_1_for_equal_and_rotated_states_and_near_0_for_unrelated_ones() -> None:
    """Also with fewer rows than dimensions, where the biased estimate is near 1 for all states."""
    rng = np.random.default_rng(0)
    for rows, wide in ((60, 5), (30, 400)):
        states = rng.normal(size=(rows, wide))
        rotation, _ = np.linalg.qr(rng.normal(size=(wide, wide)))
        assert linear_cka(states, states) == pytest.approx(1)
        assert linear_cka(states, 3 * states @ rotation) == pytest.approx(1)
        assert abs(linear_cka(states, rng.normal(size=(rows, wide)))) < 0.2
    assert linear_cka(states, np.ones((30, 4))) == 1.0
    assert linear_cka(states[:3], states[3:6]) == 1.0


def test_the_unbiased_hsic_follows_its_definition() -> None:
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


def test_the_relative_norm_is_the_norm_divided_by_the_typical_one() -> None:
    scores = scores_of(
        "relative_gradient_norm", local_result(typical=np.array([9.0, 4.0, 9.0, 0.5]))
    )
    assert (scores[1], scores[3]) == (0.5, 2.0)


def test_an_unknown_typical_norm_is_replaced_by_the_mean_of_the_known_ones() -> None:
    scores = scores_of(
        "relative_gradient_norm", local_result(typical=np.array([0.0, 4.0, 0.0, 0.0]))
    )
    assert (scores[1], scores[3]) == (0.5, 0.25)
    plain = scores_of("relative_gradient_norm", local_result(typical=np.zeros(4)))
    assert (plain[1], plain[3]) == (2.0, 1.0)


def test_typical_norms_do_not_depend_on_the_size_of_a_client_s_gradients() -> None:
    """A client whose gradients are ten times as large counts as any other."""
    one, ten_times = [1.0, 3.0, 0.0], [30.0, 10.0, 0.0]
    # Shares of a client's mean: 1/2 and 3/2; 3/2 and 1/2.
    assert typical_norms([one, ten_times]) == pytest.approx((1.0, 1.0, 0.0))
    assert typical_norms([one]) == pytest.approx((0.5, 1.5, 0.0))
    assert typical_norms([]) is None
    assert typical_norms([[0.0, 0.0]]) is None


def test_typical_norms_of_clients_that_trained_different_layers() -> None:
    """Upper layers have larger gradients, and half of the clients train those alone."""
    rng = np.random.default_rng(0)
    typical = np.array([0.4, 0.8, 1.2, 1.6])  # 1 on average
    size = rng.uniform(0.1, 10, size=(8, 1))
    norms = size * typical
    norms[4:, :2] = 0.0
    found = typical_norms(norms.tolist())
    assert found == pytest.approx(typical, rel=1e-6)
