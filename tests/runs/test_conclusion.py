"""The sentences with which a run ends."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from droppeft.runs.conclusion import conclude, standard_error

RESULT: dict[str, Any] = {
    "global_accuracy": 0.7,
    "global_loss": 1.0,
    "majority_accuracy": 0.125,
    "initial_accuracy": 0.11,
    "test_rows": 1000,
    "sampled_test_rows": 500,
    "config": {"training": {"schedule": "constant"}},
    "best_round": 5,
    "best_accuracy": 0.72,
    "rounds": 6,
    "personalised_accuracy": None,
    "personalised_worst_tenth": None,
    "own_majority_accuracy": 0.25,
    "upload_bytes": 5_000_000,
    "download_bytes": 6_000_000,
    "activation_bytes_peak": 45_100_000,
}


def rows(*accuracies: float | None, failures: int = 0) -> list[Any]:
    """Rounds with these accuracies; the first one has failures."""
    found = [
        SimpleNamespace(quality={"global_accuracy": accuracy}, failures=[], cohort=[1, 2])
        for accuracy in accuracies
    ]
    found[0].failures = [{"client": 7, "reason": "fell asleep"}] * failures
    return found


def text(*accuracies: float | None, failures: int = 0, **changes: Any) -> str:
    return " ".join(conclude({**RESULT, **changes}, rows(*accuracies, failures=failures)))


def test_accuracy_has_its_references_and_what_it_cost() -> None:
    found = text(0.7)
    assert "names the right class for 70.0% of the 1,000 test texts" in found
    assert "Before training it was 11.0%" in found
    assert "most frequent class gives 12.5%" in found
    assert "sent 5.0 MB and received 6.0 MB" in found
    assert "at most 45.1 MB" in found
    assert "learnt little" not in found


def test_a_run_that_learnt_nothing_says_so() -> None:
    # One standard error above .125 on 1,000 texts is .1398.
    assert "learnt little or nothing: try more rounds" in text(0.13, global_accuracy=0.139)
    assert "learnt little" not in text(0.14, global_accuracy=0.141)
    assert "learnt little" in text(0.14, global_accuracy=0.141, test_rows=100)


def test_the_standard_error_of_a_difference() -> None:
    draws = np.random.default_rng(0).binomial(500, 0.6, size=(20_000, 2)) / 500
    assert standard_error(0.6, 500) == pytest.approx(np.diff(draws).std(), rel=0.02)


DECAYING = {"config": {"training": {"schedule": "linear"}}}
RISING = "still rising"
FLAT = "no longer improved"
FALLING = "was falling"
ROSE = "improved towards the end"
UNCHANGED = "did not change beyond chance"


@pytest.mark.parametrize(
    ("accuracies", "constant", "decaying"),
    [
        ((0.3, 0.4, 0.5, 0.52, 0.6, 0.7), RISING, ROSE),
        ((0.7, 0.7, 0.7, 0.705, 0.705, 0.705), FLAT, UNCHANGED),
        ((0.56, 0.56, 0.56, 0.54, 0.54, 0.54), FLAT, UNCHANGED),  # 10 of 500 texts
        ((0.56, 0.56, 0.56, 0.52, 0.52, 0.52), FALLING, FALLING),
        ((0.7, 0.72, 0.71, 0.6, 0.5, 0.4), FALLING, FALLING),
        ((0.1, None, 0.3, None, 0.4, None, 0.5, None, 0.6, None, 0.7), RISING, ROSE),
        ((0.9, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3), FLAT, UNCHANGED),
        ((0.9, 0.3, 0.3, 0.5, 0.5), RISING, ROSE),  # two beside two
    ],
)
def test_the_trend_compares_the_last_evaluations_with_those_before(
    accuracies: tuple[float | None, ...], constant: str, decaying: str
) -> None:
    every = {RISING, FLAT, FALLING, ROSE, UNCHANGED}
    assert {one for one in every if one in text(*accuracies)} == {constant}
    assert {one for one in every if one in text(*accuracies, **DECAYING)} == {decaying}


def test_few_rows_show_no_trend() -> None:
    accuracies = (0.5, 0.5, 0.5, 0.6, 0.6, 0.6)
    assert RISING in text(*accuracies)
    assert FLAT in text(*accuracies, sampled_test_rows=30)


LOSSES: dict[str, Any] = {
    **{key: value for key, value in RESULT.items() if not key.endswith(("_accuracy", "_f1"))},
    **{"metric": "loss", "initial_loss": 4.0, "global_loss": 1.5, "best_loss": 1.5},
    "personalised_loss": None,
    "sampled_test_rows": 500,
}


def of_losses(*values: float, **changes: Any) -> str:
    found = [
        SimpleNamespace(quality={"global_loss": value}, failures=[], cohort=[1]) for value in values
    ]
    return " ".join(conclude({**LOSSES, **changes}, found))  # type: ignore[arg-type]


def test_a_loss_is_compared_with_that_before_training() -> None:
    found = of_losses(1.5)
    assert found.startswith("The loss of the global model on the 1,000 test texts is 1.500.")
    assert "Before training it was 4.000 on 500 of them." in found
    assert "learnt little" not in found
    assert "learnt little or nothing: try more rounds" in of_losses(3.995, global_loss=3.995)
    assert "learnt little or nothing" in of_losses(5.0, global_loss=5.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3.0, 3.0, 3.0, 2.0, 2.0, 2.0), "Loss was still falling when the run ended"),
        ((2.0, 2.0, 2.0, 2.005, 2.0, 2.0), "Loss no longer improved when the run ended"),
        ((2.0, 2.0, 2.0, 3.0, 3.0, 3.0), "Loss was rising when the run ended"),
    ],
)
def test_a_loss_gets_better_by_falling(values: tuple[float, ...], expected: str) -> None:
    assert expected in of_losses(*values)


def test_a_diverged_run_has_no_trend() -> None:
    nan = float("nan")
    found = of_losses(2.0, 2.0, 2.0, nan, nan, nan, global_loss=nan)
    assert "Training diverged" in found
    assert "when the run ended" not in found


def test_a_personalised_loss_has_no_most_frequent_class() -> None:
    found = of_losses(1.5, personalised_loss=1.25, personalised_worst_tenth=2.5)
    assert "it is 1.250 on average, and 2.500 in the worst tenth of the clients." in found
    assert "class" not in found


def test_what_to_do_about_a_trend() -> None:
    assert "try rounds=12" in text(0.3, 0.4, 0.5, 0.52, 0.6, 0.7)
    falling = text(0.7, 0.72, 0.71, 0.6, 0.5, 0.4)
    assert "after its best in round 5 (72.0%): try fewer rounds" in falling
    decaying = text(0.3, 0.4, 0.5, 0.52, 0.6, 0.7, **DECAYING)
    assert "only a longer run, such as rounds=12, shows whether more rounds help" in decaying


@pytest.mark.parametrize("accuracies", [(0.7,), (0.3, 0.5, 0.7), (None,) * 7])
def test_few_evaluations_have_no_trend(accuracies: tuple[float | None, ...]) -> None:
    found = text(*accuracies)
    assert "towards the end" not in found
    assert "when the run ended" not in found


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_divergence(loss: float) -> None:
    found = text(0.1, global_loss=loss)
    assert "Training diverged" in found
    assert "right class" not in found


def test_without_a_global_model() -> None:
    found = text(None, global_accuracy=None, global_loss=None, personalised_accuracy=0.8)
    assert found.startswith("With these settings there is no global model")


def test_the_clients_models_have_their_reference() -> None:
    found = text(0.7, personalised_accuracy=0.8, personalised_worst_tenth=0.55)
    assert "80.0% on average, and 55.0% in the worst tenth" in found
    assert "own most frequent class gives 25.0%" in found


def test_failures_are_counted() -> None:
    expected = "2 of 6 updates could not be merged; the last one of client 7: fell asleep."
    assert expected in text(0.7, 0.7, 0.7, failures=2)
    assert "could not be merged" not in text(0.7)
