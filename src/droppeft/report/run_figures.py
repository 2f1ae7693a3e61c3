"""The figures of the page of a run: quality with its references, and losses, by round. Ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from droppeft.report.drawing import COLOURS, INK, looks, new_figure, style, whole_numbers
from droppeft.runs.ledger import RoundRow
from droppeft.tasks.metrics import LOSS, METRICS, Metric

MARKED = 40
"""Most points of a curve that have a marker each."""

DOTS = ((0, (1, 1.5)), (0, (5, 2)), (0, (6, 2, 1, 2)), (0, (1, 4)))
"""Line styles of the references."""


def run_figures(rows: Sequence[RoundRow], result: Mapping[str, Any]) -> list[Any]:
    """Return matplotlib figures of quality and losses by round, the primary metric first.

    Args:
        rows: of all rounds.
        result: content of ``result.json``.
    """
    with style():
        metric = shown_metric(result)
        quality = None if metric is None else _quality(rows, result, metric)
        losses = _losses(rows, result)
    made = [losses, quality] if result["metric"] == LOSS.name else [quality, losses]
    return [figure for figure in made if figure is not None]


def shown_metric(result: Mapping[str, Any]) -> Metric | None:
    """The first metric that is no loss and is a share; ``None`` without a global model."""
    shares = [one for one in METRICS.values() if one.most == 1]
    return next((one for one in shares if result.get(one.key("global")) is not None), None)


def references(result: Mapping[str, Any], metric: Metric) -> dict[str, float]:
    """Values of a metric to compare with, by their names."""
    known: dict[str, float | None] = {}
    if result["metric"] == metric.name:
        known = {
            "target": result["target"],
            "TF-IDF + linear SVM": result.get("tfidf_accuracy"),
            "most frequent class": result.get("majority_accuracy"),
        }
    return {name: value for name, value in known.items() if value is not None}


def _quality(rows: Sequence[RoundRow], result: Mapping[str, Any], metric: Metric) -> Any:
    """The quality of the global model by round, from before training on."""
    from matplotlib.ticker import PercentFormatter

    values = _curve(rows, metric, result[metric.key("initial")])
    figure, axis = new_figure(3.2)
    _draw(axis, values, 0, f"{metric.label} of the global model")
    _mark_delivered(axis, values, result)
    for place, (name, value) in enumerate(references(result, metric).items()):
        axis.axhline(
            value, color=INK, linewidth=1, linestyle=DOTS[place], label=f"{name} {value:.1%}"
        )
    axis.set(ylabel=metric.label, xlabel="round")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    return _finished(figure, axis)


def _losses(rows: Sequence[RoundRow], result: Mapping[str, Any]) -> Any:
    """The losses by round; ``None`` if none was measured."""
    curves = {
        "test texts, global model": _curve(rows, LOSS, result["initial_loss"]),
        "training, mean of the clients": [
            (row.round, row.train_loss) for row in rows if row.train_loss is not None
        ],
        "validation rows of clients, global model": [
            (row.round, row.validation_loss) for row in rows if row.validation_loss is not None
        ],
    }
    if len(curves["test texts, global model"]) == 1:  # no global model
        del curves["test texts, global model"]
    if not any(curves.values()):
        return None
    figure, axis = new_figure(3.2)
    for number, (name, points) in enumerate(curves.items()):
        if points:
            _draw(axis, points, number, name)
    if result["metric"] == LOSS.name and result["target"] is not None:
        label = f"target {result['target']:.3f}"
        axis.axhline(result["target"], color=INK, linewidth=1, linestyle=DOTS[0], label=label)
    axis.set(xlabel="round", ylabel="loss, nats")
    return _finished(figure, axis)


def _curve(
    rows: Sequence[RoundRow], metric: Metric, initial: float | None
) -> list[tuple[int, float]]:
    """(round, value) of every evaluation, with round 0 before training."""
    key = metric.key("global")
    known = [(0, initial), *((row.round, row.quality.get(key)) for row in rows)]
    return [(round, value) for round, value in known if value is not None]


def _draw(axis: Any, points: Sequence[tuple[int, float]], number: int, label: str) -> None:
    across, up = zip(*points, strict=True)
    size = {"markersize": 4, "linewidth": 1.6, "markevery": max(1, len(points) // MARKED)}
    axis.plot(across, up, **looks(number), **size, label=label)


def _mark_delivered(
    axis: Any, values: Sequence[tuple[int, float]], result: Mapping[str, Any]
) -> None:
    """Put a ring around the round whose model is delivered, if it is not the last one."""
    delivered = result["delivered_round"]
    points = [(round, value) for round, value in values if round == delivered]
    if points and delivered != result["rounds"]:
        ring: dict[str, Any] = {"mfc": "none", "mec": COLOURS[1], "mew": 1.6, "linestyle": "none"}
        axis.plot(*zip(*points, strict=True), "o", ms=11, label=f"delivered: {delivered}", **ring)


def _finished(figure: Any, axis: Any) -> Any:
    axis.xaxis.set_major_locator(whole_numbers())
    axis.grid(visible=True)
    figure.legend(loc="outside upper left", ncols=1, frameon=False, fontsize=9)
    return figure
