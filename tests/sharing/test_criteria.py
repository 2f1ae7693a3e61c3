"""The contract of every criterion, and the arithmetic of each."""

import typing
from dataclasses import replace

import numpy as np
import pytest

from droppeft.config import SharingConfig
from droppeft.gradients import Moments
from droppeft.sharing.criteria import CRITERIA, Seen, Turn, linear_cka, new_scores

LAYERS = 4
EYE = np.eye(3)


def turn(**changes: typing.Any) -> Turn:
    """Layer 0 was not trained, layer 2 never ran; all else moves."""
    made = Turn(
        active_steps=np.array([4.0, 4.0, 0.0, 2.0]),
        gradients=Moments(
            norm=np.array([0.0, 2.0, 0.0, 1.0]),
            square=np.array([0.0, 5.0, 0.0, 1.5]),
            square_of_mean=np.array([0.0, 2.0, 0.0, 0.5]),
        ),
        change=lambda: np.array([0.0, 0.8, 0.0, 0.6]),
        seen=lambda: [Seen(1 - place / 10, EYE, EYE * (place + 1)) for place in range(LAYERS)],
        undone=lambda layers: [layer / 10 for layer in layers],
        layers=(1, 2, 3),
        rng=np.random.default_rng(0),
    )
    return replace(made, **changes)


def test_the_configuration_knows_them_all() -> None:
    names = typing.get_args(SharingConfig.model_fields["criterion"].annotation)
    assert names == tuple(CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_layer_without_a_new_score_keeps_the_old_one(name: str) -> None:
    scores = new_scores(name, turn(), (7.0, 7.0, 7.0, 7.0))
    assert len(scores) == LAYERS
    assert np.isfinite(scores).all()
    old = [layer for layer in range(LAYERS) if scores[layer] == 7.0]
    assert old == ([0, 2] if CRITERIA[name].of == "steps" else [])


# Derived by hand from the numbers of turn().
EXPECTED = {
    "gradient_norm": (2.0, 1.0),
    "fisher": (5.0, 1.5),
    # Of 4 steps: 2 / ((5 - 2) 4 / 3) = .5; of 2 steps: .5 / ((1.5 - .5) 2 / 1) = .25.
    "gradient_snr": (0.5, 0.25),
    "weight_change": (0.2, 0.3),
    "block_influence": (0.1, 0.3),
    "cka": (0.0, 0.0),  # a multiple of the same is as like as can be
    "leave_one_out": (0.1, 0.3),
    "position": (1.0, 3.0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_are_what_the_formula_says(name: str) -> None:
    scores = new_scores(name, turn(), (0.0,) * LAYERS)
    assert (scores[1], scores[3]) == pytest.approx(EXPECTED[name], abs=1e-12)


def test_every_criterion_but_the_lot_has_a_number_here() -> None:
    assert EXPECTED.keys() == CRITERIA.keys() - {"random"}


def test_only_what_is_asked_for_is_run() -> None:
    def refuse(*args: object) -> typing.Any:
        raise AssertionError("nobody asked")

    quiet = turn(change=refuse, seen=refuse, undone=refuse)
    for name, criterion in CRITERIA.items():
        if criterion.runs_model == "no" and criterion.reads != "start":
            new_scores(name, quiet, (0.0,) * LAYERS)
        else:
            with pytest.raises(AssertionError, match="nobody asked"):
                new_scores(name, quiet, (0.0,) * LAYERS)


def test_gradients_that_agree_are_a_signal_and_others_noise() -> None:
    gradients = Moments(np.ones(4), np.ones(4), np.array([0.0, 1.0, 0.0, 0.25]))
    scores = new_scores("gradient_snr", turn(gradients=gradients), (0.0,) * LAYERS)
    assert scores[1] > 1e6 > scores[3]


def test_cka_is_one_for_the_same_and_for_a_turned_copy_and_less_for_others() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(12, 5))
    turned, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    assert linear_cka(states, states) == pytest.approx(1)
    assert linear_cka(states, 3 * states @ turned + 1) == pytest.approx(1)
    assert linear_cka(states, rng.normal(size=(12, 5))) < 0.7
    assert linear_cka(states, np.ones((12, 5))) == 1.0


def test_cka_is_that_of_the_paper() -> None:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred columns, in the other order of multiplication."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.linalg.norm
    assert linear_cka(x, y) == pytest.approx(norm(y.T @ x) ** 2 / norm(x.T @ x) / norm(y.T @ y))
