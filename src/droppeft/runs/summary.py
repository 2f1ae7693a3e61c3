"""Summary of all rounds of a run: totals, best values, and when a target is reached. Ours."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from droppeft.runs.ledger import RoundRow, mean_or_none
from droppeft.tasks.metrics import Metric

ROUNDING = 1e-9
"""Tolerance of comparing a mean of evaluations with a target."""

SMOOTHED_EVALUATIONS = 3
"""A target is reached when the mean of this many consecutive evaluations reaches it."""

LAYERS_BY_MODE = ("mean_active_layers", "mean_forward_layers", "mean_skipped_layers")
"""Columns of a round whose means over the rounds are in the summary."""


def summarise(
    rows: Sequence[RoundRow], initial: Mapping[str, float], metric: Metric, target: float | None
) -> dict[str, Any]:
    """Summarise all rounds: totals, best values and the time until the target is reached.

    Args:
        rows: of all rounds.
        initial: value of each metric before round 1.
        metric: the task's primary metric.
        target: its value that is to be reached, or ``None``.
    """
    evaluations = [(row.round, row.quality[metric.key("global")]) for row in rows]
    measured = [(value, round) for round, value in evaluations if value is not None]
    best, best_round = metric.best(measured)
    reached = target_round(evaluations, initial[metric.name], target, metric)
    until = [row for row in rows if reached is not None and row.round <= reached]
    return {
        "rounds": len(rows),
        metric.key("first"): measured[0][0] if measured else None,
        "first_round": measured[0][1] if measured else None,
        metric.key("best"): best,
        "best_round": best_round,
        "train_loss": rows[-1].train_loss if rows else None,
        **{
            name: mean_or_none([value for row in rows if (value := getattr(row, name)) is not None])
            for name in LAYERS_BY_MODE
        },
        "activation_bytes_peak": max((row.activation_bytes_peak for row in rows), default=0),
        "upload_bytes": sum(row.upload_bytes for row in rows),
        "download_bytes": sum(row.download_bytes for row in rows),
        "round_measured_s": sum(row.round_measured_s for row in rows),
        "round_modelled_s": sum_if_all_known([row.round_modelled_s for row in rows]),
        "energy_modelled_j": sum_if_all_known([row.energy_modelled_j for row in rows]),
        "idle_modelled_share": mean_or_none(
            [row.idle_modelled_share for row in rows if row.idle_modelled_share is not None]
        ),
        "train_wall_s": sum(row.train_wall_s for row in rows),
        "evaluation_wall_s": sum(row.evaluation_wall_s for row in rows),
        "host_wall_s": sum(row.host_wall_s for row in rows),
        "target": target,
        "target_round": reached,
        "time_to_target_measured_s": sum(row.round_measured_s for row in until)
        if reached
        else None,
        "time_to_target_modelled_s": sum_if_all_known([row.round_modelled_s for row in until])
        if reached
        else None,
        "time_to_target_host_s": sum(row.host_wall_s - row.evaluation_wall_s for row in until)
        if reached
        else None,
    }


def target_round(
    evaluations: Iterable[tuple[int, float | None]],
    initial: float,
    target: float | None,
    metric: Metric,
) -> int | None:
    """Return the first round at which the mean of the last three evaluations reaches the target.

    Args:
        evaluations: pairs of round and value; the value is ``None`` without an evaluation.
        initial: value before round 1; it counts as an evaluation.
        target: value to be reached, or ``None``.
        metric: what is evaluated.

    Returns:
        ``None`` if the target is not reached or there is none.
    """
    if target is None:
        return None
    recent = [initial]
    for round, value in evaluations:
        if value is None:
            continue
        recent = [*recent, value][-SMOOTHED_EVALUATIONS:]
        mean = sum(recent) / len(recent)
        if len(recent) == SMOOTHED_EVALUATIONS and metric.gain(mean, target) >= -ROUNDING:
            return round
    return None


def sum_if_all_known(values: Sequence[float | None]) -> float | None:
    """The sum, or ``None`` if a value is ``None``."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
