"""Named measures of quality. Ours."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from droppeft.quantities import percent


@dataclass(frozen=True)
class Metric:
    """A measure of a model's quality.

    Attributes:
        name: part of the keys of results, as in ``global_accuracy``.
        label: how texts and figures call it.
        higher_is_better: whether a larger value is a better one.
        most: largest possible value; the smallest is 0.
    """

    name: str
    label: str
    higher_is_better: bool
    most: float = math.inf

    def key(self, whose: str) -> str:
        """Return the key of a result: ``global_accuracy`` for ``global``."""
        return f"{whose}_{self.name}"

    def is_possible(self, value: float) -> bool:
        """Return whether a value is finite and in the metric's range."""
        return math.isfinite(value) and 0 <= value <= self.most

    def gain(self, value: float, over: float) -> float:
        """Return by how much a value is better than another; below 0 if it is worse."""
        return value - over if self.higher_is_better else over - value

    def best(self, pairs: Iterable[tuple[float, int]]) -> tuple[float, int] | tuple[None, None]:
        """Return the best of pairs of value and round, the first of equal ones.

        Values that are not a number are left out, which those of a diverged run may be. The result
        is ``(None, None)`` if no pair is left.
        """
        comparable = [pair for pair in pairs if not math.isnan(pair[0])]
        if not comparable:
            return None, None
        return max(comparable, key=lambda pair: self.gain(pair[0], over=0.0))

    def worst_first(self, values: Iterable[float]) -> list[float]:
        """Return the values in order, the worst one first."""
        return sorted(values, reverse=not self.higher_is_better)

    def text(self, value: float | None) -> str:
        """Return a value for a table: ``.588`` for a fraction, ``1.234`` otherwise, or a dash."""
        if value is None:
            return "–"
        text = f"{value:.3f}"
        return text.removeprefix("0") if self.most == 1 else text

    def in_percent(self, value: float | None) -> str:
        """Return a value for a sentence: ``58.8%`` for a fraction, else as :meth:`text` does."""
        return percent(value) if self.most == 1 else self.text(value)


ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True, most=1.0)
"""Fraction of the rows that is classified correctly."""

F1 = Metric("f1", "F1", higher_is_better=True, most=1.0)
"""F1 of class 1 with two classes, else the mean over the classes that occur."""

LOSS = Metric("loss", "loss", higher_is_better=False)
"""Mean cross-entropy in nats, which every task has."""

PERPLEXITY = Metric("perplexity", "perplexity", higher_is_better=False)
"""Exponential of the mean loss by token."""

TOKEN_ACCURACY = Metric("token_accuracy", "token accuracy", higher_is_better=True, most=1.0)
"""Fraction of the tokens that are learnt which the model finds most probable."""

ROUGE_L = Metric("rouge_l", "ROUGE-L", higher_is_better=True, most=1.0)
"""Of generated texts, as :class:`~droppeft.tasks.text_metrics.TextScores` has it."""

CHRF = Metric("chrf", "chrF", higher_is_better=True, most=1.0)
"""Of generated texts, likewise."""

EXACT_MATCH = Metric("exact_match", "exact match", higher_is_better=True, most=1.0)
"""Of generated texts, likewise."""

TEXT_METRICS = {metric.name: metric for metric in (ROUGE_L, CHRF, EXACT_MATCH)}
"""All metrics of generated texts by name."""

METRICS = {metric.name: metric for metric in (ACCURACY, F1, LOSS, PERPLEXITY, TOKEN_ACCURACY)}
"""All metrics of a model by name; a comparison stores the values of each."""


def primary_metric(about: Mapping[str, Any]) -> Metric:
    """Return the primary metric of a result or of what identifies a run.

    Stored comparisons that name none are about classification.
    """
    return METRICS[about.get("metric") or ACCURACY.name]


def metrics_in(result: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics of a result's global model."""
    return [metric for metric in METRICS.values() if metric.key("global") in result]


def quality(
    whose: str, metrics: Iterable[Metric], values: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return values by the keys of results.

    ``None`` stands for a value that is not finite, and for each metric if there are no values.
    """
    if values is None:
        return {metric.key(whose): None for metric in metrics}
    found = {metric.key(whose): values[metric.name] for metric in metrics}
    return {key: value if math.isfinite(value) else None for key, value in found.items()}
