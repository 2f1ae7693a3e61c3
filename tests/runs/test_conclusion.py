"""The sentences with which a run ends."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from droppeft.runs.conclusion import conclude, standard_error, trend_of

RESULT: dict[str, Any] = {
    "global_accuracy": 0.7,
    "global_loss": 1.0,
    "majority_accuracy": 0.125,
    "initial_accuracy": 0.11,
    "test_rows": 1000,
    "sampled_test_rows": 500,
    "config": {
        "training": {"schedule": "constant", "learning_rate": 0.001},
        "frozen": {"layers": 2},
    },
    "num_layers": 6,
    "mean_skipped_layers": 0.0,
    "tfidf_accuracy": 0.6,
    "delivered_round": 6,
    "clients_have_own_models": False,
    "best_round": 5,
    "best_accuracy": 0.72,
    "rounds": 6,
    "personalised_accuracy": None,
    "personalised_worst_tenth": None,
    "own_majority_accuracy": 0.25,
    "upload_bytes": 5_000_000,
    "download_bytes": 6_000_000,
    "activation_bytes_peak": 45_100_000,
    "privacy": None,
}


def rows(*accuracies: float | None, failures: int = 0) -> list[Any]:
    """Rounds with these accuracies; the first one has failures."""
    found = [
        SimpleNamespace(
            round=round,
            quality={"global_accuracy": accuracy},
            validation_loss=None if accuracy is None else 1 - accuracy,
            failures=[],
            cohort=[1, 2],
            notes=None,
            clipped=[],
            limited=[],
            opposed=[],
            diverged=False,
        )
        for round, accuracy in enumerate(accuracies, start=1)
    ]
    found[0].failures = [{"client": 7, "reason": "fell asleep"}] * failures
    return found


def concluded(result: dict[str, Any], found: list[Any]) -> str:
    return " ".join(conclude(result, found, trend_of(result, found)))


def text(*accuracies: float | None, failures: int = 0, **changes: Any) -> str:
    return concluded({**RESULT, **changes}, rows(*accuracies, failures=failures))


def test_accuracy_has_its_references_and_what_it_cost() -> None:
    found = text(0.7)
    assert "names the right class for 70.0% of the 1,000 test texts" in found
    assert "Before training it was 11.0%" in found
    assert "A linear SVM on TF-IDF features of all texts in one place gives 60.0%, and" in found
    assert "always naming the most frequent class 12.5%." in found
    assert "Always naming the most frequent class 12.5%." in text(0.7, tfidf_accuracy=None)
    assert "sent 5.0 MB and received 6.0 MB" in found
    assert "at most 45.1 MB" in found
    assert "learnt little" not in found


def test_a_run_that_learnt_nothing_says_so() -> None:
    # One standard error above .125 on 1,000 texts is .1398.
    expected = "learnt little or nothing: try rounds=12, or training.learning_rate=0.003."
    assert expected in text(0.13, global_accuracy=0.139)
    assert "learnt little" not in text(0.14, global_accuracy=0.141)
    assert "learnt little" in text(0.14, global_accuracy=0.141, test_rows=100)


def test_a_run_of_few_rounds_is_to_be_longer() -> None:
    few = text(0.13, global_accuracy=0.13, rounds=2, delivered_round=2)
    assert "2 rounds are few; try rounds=10 training.learning_rate=0.003." in few


def test_a_high_rate_is_to_be_lowered() -> None:
    training = {"schedule": "constant", "learning_rate": 0.03}
    config = {**RESULT["config"], "training": training}
    assert "or training.learning_rate=0.01." in text(0.13, global_accuracy=0.13, config=config)


def test_a_run_below_the_svm_says_so() -> None:
    assert "not yet as good as the SVM: try rounds=12" in text(0.5, global_accuracy=0.5)
    rising = text(0.1, 0.2, 0.3, 0.4, 0.45, 0.5, global_accuracy=0.5)
    assert "not yet as good as the SVM." in rising
    assert rising.count("rounds=12") == 1
    assert "as good as" not in text(0.59, global_accuracy=0.59)  # within the standard error
    assert "as good as" not in text(0.5, global_accuracy=0.5, tfidf_accuracy=None)


def test_the_standard_error_of_a_difference() -> None:
    draws = np.random.default_rng(0).binomial(500, 0.6, size=(20_000, 2)) / 500
    assert standard_error(0.6, 500) == pytest.approx(np.diff(draws).std(), rel=0.02)


DECAYING = {
    "config": {**RESULT["config"], "training": {"schedule": "linear", "learning_rate": 0.001}}
}
RISING = "still rising"
FLAT = "has been flat since round"
FALLING = "was falling"


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((0.3, 0.4, 0.5, 0.52, 0.6, 0.7), RISING),
        ((0.7, 0.7, 0.7, 0.705, 0.705, 0.705), f"{FLAT} 1 "),
        ((0.3, 0.5, 0.7, 0.7, 0.71, 0.7, 0.7, 0.71), f"{FLAT} 3 "),
        ((0.56, 0.56, 0.56, 0.54, 0.54, 0.54), f"{FLAT} 1 "),  # 10 of 500 texts
        ((0.56, 0.56, 0.56, 0.52, 0.52, 0.52), FALLING),
        ((0.7, 0.72, 0.71, 0.6, 0.5, 0.4), FALLING),
        ((0.1, None, 0.3, None, 0.4, None, 0.5, None, 0.6, None, 0.7), RISING),
        ((0.9, 0.3, 0.3, 0.5, 0.5), RISING),  # two beside two
    ],
)
def test_the_trend_compares_the_last_evaluations_with_those_before(
    accuracies: tuple[float | None, ...], expected: str
) -> None:
    for found in (text(*accuracies), text(*accuracies, **DECAYING)):
        assert expected in found
        assert sum(one in found for one in (RISING, FLAT, FALLING)) == 1


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


def of_losses(*values: float | None, **changes: Any) -> str:
    found = [
        SimpleNamespace(
            round=round,
            quality={"global_loss": value},
            failures=[],
            cohort=[1],
            notes=None,
            clipped=[],
            limited=[],
            opposed=[],
            diverged=value is None,
        )
        for round, value in enumerate(values, start=1)
    ]
    return concluded({**LOSSES, **changes}, found)


def test_a_loss_is_compared_with_that_before_training() -> None:
    found = of_losses(1.5)
    assert found.startswith("The loss of the global model on the 1,000 test texts is 1.500.")
    assert "Before training it was 4.000 on 500 of them." in found
    assert "learnt little" not in found
    assert "learnt little or nothing: try rounds=12" in of_losses(3.995, global_loss=3.995)
    assert "learnt little or nothing" in of_losses(5.0, global_loss=5.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3.0, 3.0, 3.0, 2.0, 2.0, 2.0), "Loss was still falling when the run ended"),
        ((2.0, 1.5, 1.0, 1.0, 1.005, 1.0, 1.0, 1.0), "Loss has been flat since round 3"),
        ((2.0, 2.0, 2.0, 3.0, 3.0, 3.0), "Loss was rising when the run ended"),
    ],
)
def test_a_loss_gets_better_by_falling(values: tuple[float, ...], expected: str) -> None:
    assert expected in of_losses(*values)


def test_a_diverged_run_has_no_trend() -> None:
    found = of_losses(2.0, 2.0, 2.0, None, None, None, global_loss=None)
    assert found.startswith("Training diverged: ")
    assert "is not finite in round 4. Try a lower training.learning_rate, such as 0.0003" in found
    assert "when the run ended" not in found
    assert "no global model" not in found


def test_a_personalised_loss_has_no_most_frequent_class() -> None:
    found = of_losses(1.5, personalised_loss=1.25, personalised_worst_tenth=2.5)
    assert "it is 1.250 on average, and 2.500 in the worst tenth of the clients." in found
    assert "class" not in found


def test_what_to_do_about_a_trend() -> None:
    assert "try rounds=12" in text(0.3, 0.4, 0.5, 0.52, 0.6, 0.7)
    falling = text(0.7, 0.72, 0.71, 0.6, 0.5, 0.4)
    assert (
        "after its best in round 5 (72.0%): try a lower training.learning_rate, such as" in falling
    )
    flat = (0.7, 0.7, 0.7, 0.7, 0.7, 0.7)
    assert "rounds=12 may still improve it" in text(*flat, **DECAYING)
    assert "rounds=12" not in text(*flat)


def test_another_round_than_the_last_is_named() -> None:
    found = text(0.7, 0.8, 0.6, delivered_round=2, rounds=3)
    assert "The model of round 2 is delivered" in found
    assert "0.200; that of the last round has 0.400." in found
    assert "is delivered" not in text(0.7, 0.8, 0.6, rounds=3, delivered_round=3)


def test_heavy_dropping_is_named_where_little_was_learnt() -> None:
    dropped = {"mean_skipped_layers": 2.0, "best_accuracy": 0.13}
    assert "2.0 of 4 layers were dropped" in text(0.13, global_accuracy=0.13, **dropped)
    assert "were dropped" not in text(0.13, global_accuracy=0.13)
    assert "were dropped" not in text(0.7, **{**dropped, "best_accuracy": 0.7})
    assert "were dropped" in text(0.7, 0.4, **{**dropped, "best_accuracy": 0.7})


def test_a_configurator_that_changes_its_mind_has_not_settled() -> None:
    def with_best(*numbers: int) -> str:
        found = rows(*[0.7] * len(numbers))
        for row, best in zip(found, numbers, strict=True):
            row.notes = {
                "best": best,
                "labels": {"1": "all layers", "2": "upper 50% of the layers"},
            }
        return concluded(RESULT, found)

    assert "has not settled" in with_best(1, 1, 1, 1, 2, 1)
    assert "best to train all layers and then upper 50% of the layers" in with_best(
        1, 1, 1, 1, 1, 2
    )
    assert "has not settled" not in with_best(1, 2, 1, 2, 2, 2)


def test_own_models_behind_the_global_one_are_named() -> None:
    own = {"personalised_worst_tenth": 0.3, "personalised_rows": 1000}
    behind = {**own, "personalised_accuracy": 0.5}
    assert "stay behind the global one" in text(0.7, **behind, clients_have_own_models=True)
    assert "stay behind" not in text(0.7, **behind, clients_have_own_models=False)
    ahead = {**own, "personalised_accuracy": 0.69}
    assert "stay behind" not in text(0.7, **ahead, clients_have_own_models=True)


@pytest.mark.parametrize("accuracies", [(0.7,), (0.3, 0.5, 0.7), (None,) * 7])
def test_few_evaluations_have_no_trend(accuracies: tuple[float | None, ...]) -> None:
    found = text(*accuracies)
    assert "towards the end" not in found
    assert "when the run ended" not in found


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


def test_bounded_updates_are_counted_and_who_was_bounded_most_often_is_named() -> None:
    found = rows(0.7, 0.7, 0.7)
    assert "were bounded" not in concluded(RESULT, found)
    for row, clipped, limited in zip(found, ([1], [2], []), ([1], [], [2]), strict=True):
        row.accepted, row.clipped, row.limited = 2, clipped, limited
    expected = "3 of 6 updates changed or weighed more than the rest allows, and were bounded"
    assert expected in concluded(RESULT, found)
    assert "most often, in 2 rounds, those of client 2." in concluded(RESULT, found)


def test_clients_left_out_for_their_direction_are_named() -> None:
    found = rows(0.7, 0.7, 0.7)
    assert "against those of the others" not in concluded(RESULT, found)
    for row, opposed in zip(found, ([], [1, 2], [2]), strict=True):
        row.opposed = opposed
    assert (
        "3 updates of 2 clients had changes that point against those of the others, and were left "
        "out (server.direction_check); most often, in 2 rounds, those of client 2."
    ) in concluded(RESULT, found)
