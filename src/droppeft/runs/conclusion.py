"""What a finished run has shown, in sentences for screen, ``result.json`` and page. Ours."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from droppeft.quantities import bytes_text, percent
from droppeft.runs.ledger import SMOOTHED_EVALUATIONS, RoundRow

FEWEST_EVALUATIONS = 4
"""A run with fewer evaluations has no trend."""


def conclude(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> list[str]:
    """Return the sentences about a run's quality, trend, clients' models, failures and cost.

    Measured times are left out, so that a repeated run has the same sentences.

    Args:
        result: content of ``result.json``.
        rows: of all rounds.
    """
    parts = (
        _quality(result),
        _trend(result, rows),
        _clients_models(result),
        _failures(rows),
        _cost(result),
    )
    return [sentence for sentence in parts if sentence]


def _quality(result: Mapping[str, Any]) -> str | None:
    accuracy, majority = result["global_accuracy"], result["majority_accuracy"]
    if accuracy is None:
        return "With these settings there is no global model; clients have models of their own."
    if not math.isfinite(result["global_loss"]):
        return (
            "Training diverged: the loss of the global model is not finite. Try a lower "
            "training.learning_rate, or training.precision=fp32."
        )
    found = (
        f"The global model names the right class for {percent(accuracy)} of the "
        f"{result['test_rows']:,} test texts. Before training it was "
        f"{percent(result['initial_accuracy'])}; always naming the most frequent class gives "
        f"{percent(majority)}."
    )
    if accuracy > majority + standard_error(majority, result["test_rows"]):
        return found
    return (
        f"{found} It has learnt little or nothing: try more rounds, or another "
        "training.learning_rate."
    )


def standard_error(accuracy: float, rows: int) -> float:
    """The standard error of the difference of two accuracies, each on as many rows.

    The two are taken to be independent. On the same rows they are not, and their difference has a
    smaller error, so that fewer differences are called real than could be.

    Args:
        accuracy: about where both are.
        rows: 1 or more.
    """
    return math.sqrt(2 * accuracy * (1 - accuracy) / rows)


def _trend(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> str | None:
    """Compare the last evaluations with as many before, up to three each.

    A difference within the standard error is not called one. Where the learning rate falls to 0,
    the end of the curve is flat in any case, and a rise before it may be due to the falling rate:
    nothing is said then about more rounds.
    """
    values = [row.global_accuracy for row in rows if row.global_accuracy is not None]
    if len(values) < FEWEST_EVALUATIONS:
        return None
    count = min(SMOOTHED_EVALUATIONS, len(values) // 2)
    last, before = fmean(values[-count:]), fmean(values[-2 * count : -count])
    margin = standard_error((last + before) / 2, result["sampled_test_rows"])
    best = f"round {result['best_round']} ({percent(result['best_accuracy'])})"
    number = {2: "two", 3: "three"}[count]
    means = (
        f"the last {number} evaluations average {percent(last)}, the {number} before "
        f"{percent(before)}"
    )
    if last < before - margin:
        return (
            f"Accuracy was falling when the run ended ({means}), after its best in {best}: try "
            "fewer rounds, or a lower training.learning_rate."
        )
    rose = last > before + margin
    more = f"rounds={2 * result['rounds']}"
    if result["config"]["training"]["schedule"] == "constant":
        if rose:
            return f"Accuracy was still rising when the run ended ({means}): try {more}."
        return f"Accuracy no longer rose when the run ended ({means}); the best was in {best}."
    change = "rose towards the end" if rose else "did not change beyond chance towards the end"
    return (
        f"Accuracy {change} ({means}). The learning rate falls to 0 over the run, so that only a "
        f"longer run, such as {more}, shows whether more rounds help."
    )


def _clients_models(result: Mapping[str, Any]) -> str | None:
    accuracy, majority = result["personalised_accuracy"], result["own_majority_accuracy"]
    if accuracy is None:
        return None
    return (
        f"On the clients' own test texts it is {percent(accuracy)} on average, and "
        f"{percent(result['personalised_worst_tenth'])} in the worst tenth of the clients; always "
        f"naming a client's own most frequent class gives {percent(majority)}."
    )


def _failures(rows: Sequence[RoundRow]) -> str | None:
    failures = [failure for row in rows for failure in row.failures]
    if not failures:
        return None
    asked = sum(len(row.cohort) for row in rows)
    last = failures[-1]
    return (
        f"{len(failures)} of {asked} updates could not be merged; the last one of client "
        f"{last['client']}: {last['reason']}."
    )


def _cost(result: Mapping[str, Any]) -> str:
    return (
        f"All clients together sent {bytes_text(result['upload_bytes'])} and received "
        f"{bytes_text(result['download_bytes'])}; a training step stored at most "
        f"{bytes_text(result['activation_bytes_peak'])} for its backward pass."
    )
