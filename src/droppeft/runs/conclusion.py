"""What a finished run has shown, in sentences for screen, ``result.json`` and page. Ours."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from droppeft.quantities import bytes_text, counted, percent
from droppeft.runs.ledger import RoundRow
from droppeft.runs.summary import SMOOTHED_EVALUATIONS
from droppeft.tasks.metrics import ACCURACY, Metric, primary_metric
from droppeft.tasks.predictions import confused_sentence

MARGIN = 0.01
"""Losses that differ by no more than this are not called different."""

FEWEST_EVALUATIONS = 4
"""A run with fewer evaluations has no trend."""

HIGH_RATE = 3e-3
"""A run that learnt little with a lower rate gets the advice to try a higher one."""

FEW_ROUNDS = 5
"""A run with fewer rounds that learnt little gets the advice to run more of them."""

HEAVY_DROPPING = 0.4
"""Share of dropped layers from which on dropping is named as a reason for learning little."""


@dataclass(frozen=True)
class Trend:
    """How the quality of the global model moved towards the end of a run.

    Attributes:
        kind: ``improving``, ``flat`` or ``worsening``.
        sentence: says so, and what to try.
    """

    kind: Literal["improving", "flat", "worsening"]
    sentence: str


def conclude(result: Mapping[str, Any], rows: Sequence[RoundRow], trend: Trend | None) -> list[str]:
    """Return the sentences about a run's quality, trend, clients' models, failures and cost.

    Measured times are left out, so that a repeated run has the same sentences.

    Args:
        result: content of ``result.json``.
        rows: of all rounds.
        trend: as :func:`trend_of` returns it.
    """
    parts = (
        _without_global_model(result, rows),
        _divergence(result, rows),
        _quality(result, trend),
        _confused(result),
        trend.sentence if trend else None,
        _delivered(result, rows),
        _dropping(result, rows),
        _configurator(rows),
        _clients_models(result),
        _privacy(result),
        _failures(rows),
        _bounded(rows),
        _opposed(rows),
        _cost(result),
    )
    return [sentence for sentence in parts if sentence]


def _without_global_model(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> str | None:
    if result[primary_metric(result).key("global")] is not None or _diverged(rows):
        return None
    return "With these settings there is no global model; clients have models of their own."


def _divergence(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> str | None:
    found = _diverged(rows)
    if not found:
        return None
    return (
        f"Training diverged: the loss of the global model is not finite in round {found[0].round}. "
        f"Try a lower training.learning_rate, such as {_rate(result) / 3:.1g}, or "
        "training.precision=fp32."
    )


def _privacy(result: Mapping[str, Any]) -> str | None:
    found = result["privacy"]
    if found is None:
        return None
    return (
        f"The model is differentially private for each client, with epsilon {found['epsilon']:.3g} "
        f"and delta {found['delta']:g}."
    )


def _diverged(rows: Sequence[RoundRow]) -> list[RoundRow]:
    return [row for row in rows if row.diverged]


def _quality(result: Mapping[str, Any], trend: Trend | None) -> str | None:
    """The quality beside its references; what to try, unless the trend says it."""
    metric = primary_metric(result)
    if result[metric.key("global")] is None or result["global_loss"] is None:
        return None
    found = _accuracy(result) if metric == ACCURACY else _loss(result, metric)
    problem = _problem(result)
    if problem is None:
        return found
    if trend is not None and trend.kind != "flat":
        return f"{found} {problem}."
    return f"{found} {problem}: {_what_to_try(result)}."


def _loss(result: Mapping[str, Any], metric: Metric) -> str:
    before, after = (result[metric.key(whose)] for whose in ("initial", "global"))
    return (
        f"The {metric.label} of the global model on the {result['test_rows']:,} test texts is "
        f"{metric.text(after)}. Before training it was {metric.text(before)} on "
        f"{result['sampled_test_rows']:,} of them."
    )


def _accuracy(result: Mapping[str, Any]) -> str:
    return (
        f"The global model names the right class for {percent(result['global_accuracy'])} of the "
        f"{result['test_rows']:,} test texts. {_references(result)}Before training it was "
        f"{percent(result['initial_accuracy'])}."
    )


def _references(result: Mapping[str, Any]) -> str:
    """The accuracies to compare with, which need training rows on the server."""
    if "majority_accuracy" not in result:
        return ""
    svm = result["tfidf_accuracy"]
    reference = (
        "Always naming"
        if svm is None
        else f"A linear SVM on TF-IDF features of all texts in one place gives {percent(svm)}, and "
        "always naming"
    )
    return f"{reference} the most frequent class {percent(result['majority_accuracy'])}. "


def _problem(result: Mapping[str, Any]) -> str | None:
    """What is wrong with the quality, without the full stop; ``None`` if nothing is."""
    if not _has_learnt(result):
        return "It has learnt little or nothing"
    svm = result.get("tfidf_accuracy")
    if svm is None or result["global_accuracy"] >= svm - standard_error(svm, result["test_rows"]):
        return None
    return "It is not yet as good as the SVM"


def _has_learnt(result: Mapping[str, Any]) -> bool:
    """Whether the global model is better than a constant answer, or than before training."""
    metric = primary_metric(result)
    value = result[metric.key("global")]
    if metric != ACCURACY:
        return metric.gain(value, result[metric.key("initial")]) > MARGIN
    to_beat = result.get("majority_accuracy", result["initial_accuracy"])
    return bool(value > to_beat + standard_error(to_beat, result["test_rows"]))


def _confused(result: Mapping[str, Any]) -> str | None:
    """The classes that a model which has learnt confuses most often."""
    if "confusion" not in result or not _has_learnt(result):
        return None
    return confused_sentence(result["confusion"], result["class_names"])


def _what_to_try(result: Mapping[str, Any]) -> str:
    """More rounds and another learning rate, in numbers."""
    rate, rounds = _rate(result), result["rounds"]
    other = 3 * rate if rate < HIGH_RATE else rate / 3
    if rounds < FEW_ROUNDS:
        higher = f" training.learning_rate={other:.1g}" if rate < HIGH_RATE else ""
        return f"{counted(rounds, 'round')} are few; try rounds={2 * FEW_ROUNDS}{higher}"
    return f"try rounds={2 * rounds}, or training.learning_rate={other:.1g}"


def _rate(result: Mapping[str, Any]) -> float:
    rate: float = result["config"]["training"]["learning_rate"]
    return rate


def standard_error(accuracy: float, rows: int) -> float:
    """The standard error of the difference of two accuracies, each on as many rows.

    The two are taken to be independent. On the same rows they are not, and their difference has a
    smaller error, so that fewer differences are called real than could be.

    Args:
        accuracy: about where both are.
        rows: 1 or more.
    """
    return math.sqrt(2 * accuracy * (1 - accuracy) / rows)


def trend_of(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> Trend | None:
    """Compare the mean of the last evaluations with that of as many before, up to three each.

    A difference within the standard error, or within :data:`MARGIN` of a loss, is not called one.
    If there is none, the quality is flat since the first round that no later one exceeds by more
    than that. ``None`` for a run with too few evaluations, or one that diverged.
    """
    metric = primary_metric(result)
    values = _evaluations(metric, rows)
    if len(values) < FEWEST_EVALUATIONS:
        return None
    count = min(SMOOTHED_EVALUATIONS, len(values) // 2)
    only = [value for value, _ in values]
    last, before = fmean(only[-count:]), fmean(only[-2 * count : -count])
    if _diverged(rows):
        return None
    margin = _margin(metric, (last + before) / 2, result["sampled_test_rows"])
    number = {2: "two", 3: "three"}[count]
    means = (
        f"the last {number} evaluations average {metric.in_percent(last)}, the {number} before "
        f"{metric.in_percent(before)}"
    )
    name, gain = metric.label.capitalize(), metric.gain(last, before)
    rising, falling = ("rising", "falling") if metric.higher_is_better else ("falling", "rising")
    if gain < -margin:
        best = metric.in_percent(result[metric.key("best")])
        return Trend(
            "worsening",
            f"{name} was {falling} when the run ended ({means}), after its best in round "
            f"{result['best_round']} ({best}): try a lower training.learning_rate, such as "
            f"{_rate(result) / 3:.1g}.",
        )
    more = f"rounds={2 * result['rounds']}"
    if gain > margin:
        sentence = f"{name} was still {rising} when the run ended ({means}): try {more}."
        return Trend("improving", sentence)
    since = _flat_since(metric, values, margin)
    decays = result["config"]["training"]["schedule"] != "constant"
    longer = (
        f" The learning rate falls to 0 over a run, so that {more} may still improve it."
        if decays
        else ""
    )
    return Trend("flat", f"{name} has been flat since round {since} ({means}).{longer}")


def _evaluations(metric: Metric, rows: Sequence[RoundRow]) -> list[tuple[float, int]]:
    """The value of each evaluation, with its round."""
    found = [(row.quality[metric.key("global")], row.round) for row in rows]
    return [(value, round) for value, round in found if value is not None]


def _flat_since(metric: Metric, values: Sequence[tuple[float, int]], margin: float) -> int:
    """The first round that no later one exceeds by more than a margin."""
    for index, (value, round) in enumerate(values):
        if all(metric.gain(later, value) <= margin for later, _ in values[index:]):
            return round
    raise AssertionError("no value exceeds the last one, which comes last")


def _delivered(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> str | None:
    """Say so if another round than the last is delivered."""
    delivered = result["delivered_round"]
    if delivered == result["rounds"]:
        return None
    losses = {row.round: row.validation_loss for row in rows}
    last = losses[result["rounds"]]
    instead = "no valid one" if last is None else f"{last:.3f}"
    return (
        f"The model of round {delivered} is delivered, because it has the lowest loss on "
        f"validation rows of the clients, {losses[delivered]:.3f}; that of the last round has "
        f"{instead}."
    )


def _dropping(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> str | None:
    """Name heavy layer dropout as a reason if a run that used it learnt little or got worse."""
    metric, dropped = primary_metric(result), result["mean_skipped_layers"]
    layers = result["num_layers"] - result["config"]["frozen"]["layers"]
    value = result[metric.key("global")]
    if dropped is None or value is None or dropped < HEAVY_DROPPING * layers:
        return None
    best = result[metric.key("best")]
    margin = _margin(metric, best, result["sampled_test_rows"])
    last = _evaluations(metric, rows)[-1][0]
    if _has_learnt(result) and metric.gain(last, best) >= -margin:
        return None
    return (
        f"On average {dropped:.1f} of {layers} layers were dropped in a step, which can "
        "keep a model from learning: try a lower dropout.mean, or method=adaptive."
    )


def _configurator(rows: Sequence[RoundRow]) -> str | None:
    """Say what layers are worth, or that the best arm has changed in the last third of rounds."""
    notes = [row.notes for row in rows if row.notes and "best" in row.notes]
    if notes and notes[-1].get("layer_values"):
        share = worth_of_upper_half(notes[-1]["layer_values"])
        return (
            f"Training the upper half of the layers with adapters was worth {share:.0%} of "
            "training all of them, as the clients' updates tell."
        )
    best = [one["labels"][str(one["best"])] for one in notes]
    late = best[-max(len(best) // 3, 1) - 1 :]
    if len(set(late)) < 2:
        return None
    return (
        "The configurator has not settled: in the last third of the rounds it found best to train "
        f"{' and then '.join(dict.fromkeys(late))}. With more rounds it would choose more surely."
    )


def worth_of_upper_half(values: Sequence[float]) -> float:
    """The share of the values of layers that the last half of them has."""
    return sum(values[len(values) // 2 :]) / sum(values)


def _margin(metric: Metric, value: float, rows: int) -> float:
    """The smallest difference that is not taken for chance."""
    return standard_error(value, rows) if metric.most == 1 else MARGIN


def _clients_models(result: Mapping[str, Any]) -> str | None:
    metric = primary_metric(result)
    value = result[metric.key("personalised")]
    if value is None:
        return None
    found = (
        f"On the clients' own test texts it is {metric.in_percent(value)} on average, and "
        f"{metric.in_percent(result['personalised_worst_tenth'])} in the worst tenth of the clients"
    )
    if "own_majority_accuracy" in result:
        majority = percent(result["own_majority_accuracy"])
        found += f"; always naming a client's own most frequent class gives {majority}"
    shared = result[metric.key("global")]
    if shared is None or not result["clients_have_own_models"]:
        return f"{found}."
    if metric.gain(shared, value) <= _margin(metric, shared, result["personalised_rows"]):
        return f"{found}."
    return (
        f"{found}. The clients' own models stay behind the global one: try more rounds, or "
        "sharing.fraction=1, with which all layers are shared."
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


def _bounded(rows: Sequence[RoundRow]) -> str | None:
    """How many updates were bounded before they were merged, and whose most often."""
    clients = Counter(client for row in rows for client in {*row.clipped, *row.limited})
    if not clients:
        return None
    merged = sum(row.accepted for row in rows)
    most, times = min(clients.items(), key=lambda pair: (-pair[1], pair[0]))
    return (
        f"{clients.total()} of {merged} updates changed or weighed more than the rest allows, and "
        "were bounded (server.clip_norm_multiple, server.max_weight_multiple); most often, in "
        f"{counted(times, 'round')}, those of client {most}."
    )


def _opposed(rows: Sequence[RoundRow]) -> str | None:
    """Which clients were left out for the direction of their changes, and how often."""
    clients = Counter(client for row in rows for client in row.opposed)
    if not clients:
        return None
    most, times = min(clients.items(), key=lambda pair: (-pair[1], pair[0]))
    return (
        f"{counted(clients.total(), 'update')} of {counted(len(clients), 'client')} had changes "
        "that point against those of the others, and were left out (server.direction_check); most "
        f"often, in {counted(times, 'round')}, those of client {most}."
    )


def _cost(result: Mapping[str, Any]) -> str:
    return (
        f"All clients together sent {bytes_text(result['upload_bytes'])} and received "
        f"{bytes_text(result['download_bytes'])}; a training step stored at most "
        f"{bytes_text(result['activation_bytes_peak'])} for its backward pass."
    )
