"""What a finished run has shown, in sentences for screen, ``result.json`` and page. Ours."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from droppeft.quantities import bytes_text, percent
from droppeft.runs.ledger import SMOOTHED_EVALUATIONS, RoundRow
from droppeft.tasks.metrics import ACCURACY, Metric, primary_metric

MARGIN = 0.01
"""Losses that differ by no more than this are not called different."""

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
    metric = primary_metric(result)
    if result[metric.key("global")] is None:
        return "With these settings there is no global model; clients have models of their own."
    if not math.isfinite(result["global_loss"]):
        return (
            "Training diverged: the loss of the global model is not finite. Try a lower "
            "training.learning_rate, or training.precision=fp32."
        )
    return _accuracy(result) if metric == ACCURACY else _loss(result, metric)


def _loss(result: Mapping[str, Any], metric: Metric) -> str:
    before, after = (result[metric.key(whose)] for whose in ("initial", "global"))
    found = (
        f"The {metric.label} of the global model on the {result['test_rows']:,} test texts is "
        f"{metric.text(after)}. Before training it was {metric.text(before)} on "
        f"{result['sampled_test_rows']:,} of them."
    )
    if metric.gain(after, before) > MARGIN:
        return found
    return (
        f"{found} It has learnt little or nothing: try more rounds, or another "
        "training.learning_rate."
    )


def _accuracy(result: Mapping[str, Any]) -> str:
    accuracy, majority = result["global_accuracy"], result["majority_accuracy"]
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
    the end of the curve is flat in any case, and an improvement before it may be due to the falling
    rate: nothing is said then about more rounds.
    """
    metric = primary_metric(result)
    found = [row.quality[metric.key("global")] for row in rows]
    values = [value for value in found if value is not None]
    if len(values) < FEWEST_EVALUATIONS:
        return None
    count = min(SMOOTHED_EVALUATIONS, len(values) // 2)
    last, before = fmean(values[-count:]), fmean(values[-2 * count : -count])
    if not math.isfinite(last + before):
        return None
    margin = _margin(metric, (last + before) / 2, result["sampled_test_rows"])
    best = f"round {result['best_round']} ({_text(metric, result[metric.key('best')])})"
    number = {2: "two", 3: "three"}[count]
    means = (
        f"the last {number} evaluations average {_text(metric, last)}, the {number} before "
        f"{_text(metric, before)}"
    )
    name, gain = metric.label.capitalize(), metric.gain(last, before)
    rising, falling = ("rising", "falling") if metric.higher_is_better else ("falling", "rising")
    if gain < -margin:
        return (
            f"{name} was {falling} when the run ended ({means}), after its best in {best}: try "
            "fewer rounds, or a lower training.learning_rate."
        )
    improved = gain > margin
    more = f"rounds={2 * result['rounds']}"
    if result["config"]["training"]["schedule"] == "constant":
        if improved:
            return f"{name} was still {rising} when the run ended ({means}): try {more}."
        return f"{name} no longer improved when the run ended ({means}); the best was in {best}."
    change = (
        "improved towards the end" if improved else "did not change beyond chance towards the end"
    )
    return (
        f"{name} {change} ({means}). The learning rate falls to 0 over the run, so that only a "
        f"longer run, such as {more}, shows whether more rounds help."
    )


def _margin(metric: Metric, value: float, rows: int) -> float:
    """The smallest difference that is not taken for chance."""
    return standard_error(value, rows) if metric.most == 1 else MARGIN


def _clients_models(result: Mapping[str, Any]) -> str | None:
    metric = primary_metric(result)
    value = result[metric.key("personalised")]
    if value is None:
        return None
    found = (
        f"On the clients' own test texts it is {_text(metric, value)} on average, and "
        f"{_text(metric, result['personalised_worst_tenth'])} in the worst tenth of the clients"
    )
    if "own_majority_accuracy" not in result:
        return f"{found}."
    majority = percent(result["own_majority_accuracy"])
    return f"{found}; always naming a client's own most frequent class gives {majority}."


def _text(metric: Metric, value: float) -> str:
    return percent(value) if metric.most == 1 else metric.text(value)


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
