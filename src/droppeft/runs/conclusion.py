"""What a finished run has shown, in sentences for screen, ``result.json`` and page. Ours."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from droppeft.quantities import bytes_text, percent
from droppeft.runs.ledger import SMOOTHED_EVALUATIONS, RoundRow

MARGIN = 0.01
"""Accuracies that differ by no more than this are not called different."""


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
    if accuracy > majority + MARGIN:
        return found
    return (
        f"{found} It has learnt little or nothing: try more rounds, or another "
        "training.learning_rate."
    )


def _trend(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> str | None:
    """Compare the last three evaluations with the three before."""
    values = [row.global_accuracy for row in rows if row.global_accuracy is not None]
    if len(values) < 2 * SMOOTHED_EVALUATIONS:
        return None
    last = fmean(values[-SMOOTHED_EVALUATIONS:])
    before = fmean(values[-2 * SMOOTHED_EVALUATIONS : -SMOOTHED_EVALUATIONS])
    best = f"round {result['best_round']} ({percent(result['best_accuracy'])})"
    means = (
        f"the last three evaluations average {percent(last)}, the three before {percent(before)}"
    )
    if last > before + MARGIN:
        return (
            f"Accuracy was still rising when the run ended ({means}): try "
            f"rounds={2 * result['rounds']}."
        )
    if last < before - MARGIN:
        return (
            f"Accuracy was falling when the run ended ({means}), after its best in {best}: try "
            "fewer rounds, or a lower training.learning_rate."
        )
    return f"Accuracy no longer rose when the run ended ({means}); the best was in {best}."


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
