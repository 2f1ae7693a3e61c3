"""The record of a run: one row per round, one per device and round, one result at the end.

Names say what they hold: ``host`` is this process, ``measured`` a real clock, ``_s`` seconds,
``_bytes`` bytes. Nothing in this file is modelled.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from droppeft.files import sync, write_atomically
from droppeft.plans import Failure, Plan, Reply, Update, payload_bytes, plan_bytes

SCHEMA_VERSION = 2
ROUNDING = 1e-9
SMOOTHED_EVALUATIONS = 3
"""A target counts as reached when the mean of so many evaluations in a row reaches it."""


@dataclass(frozen=True)
class RoundRow:
    """One round.

    Attributes:
        round: 1 for the first.
        cohort: devices that were asked.
        accepted: how many of their Updates were merged.
        failures: device and reason of the others.
        global_accuracy, global_f1, global_loss: of the merged model at full depth on the fixed
            sample of test rows; ``None`` in a round that was not evaluated.
        train_loss: mean over accepted devices of their mean over steps.
        mean_active_layers: layers run per step, mean over all steps of accepted devices.
        activation_bytes_peak: most bytes stored for backward in any step of any device.
        upload_bytes, download_bytes: tensors that travelled, without a transport's framing.
        round_measured_s: as if devices worked side by side: the slowest turn plus the server.
        train_wall_s: training steps of all devices together.
        evaluation_wall_s: measuring the merged model, for this report only.
        saving_wall_s: writing the rows and checkpoint of the round before (this row is part of
            what is written now, so its own saving is not known yet).
        host_wall_s: the whole round in this process, evaluation and that saving included.
        upload_framed_bytes, download_framed_bytes: what the transport really carried, its
            framing of messages included and that of the network not; ``None`` where devices are in
            this process. They count what was refused or set aside, and not what was never sent;
            ``upload_bytes`` and ``download_bytes`` follow from accepted Updates and from all Plans.
    """

    round: int
    cohort: list[int]
    accepted: int
    failures: list[dict[str, Any]]
    global_accuracy: float | None
    global_f1: float | None
    global_loss: float | None
    train_loss: float | None
    mean_active_layers: float | None
    activation_bytes_peak: int
    upload_bytes: int
    download_bytes: int
    round_measured_s: float
    train_wall_s: float
    evaluation_wall_s: float
    saving_wall_s: float
    host_wall_s: float
    upload_framed_bytes: int | None = None
    download_framed_bytes: int | None = None


def device_row(plan: Plan, reply: Reply) -> dict[str, Any]:
    """One device's turn as a row of ``devices.jsonl``; a device that failed has a reason."""
    row: dict[str, Any] = {
        "round": plan.round,
        "device": plan.device,
        "accepted": isinstance(reply, Update),
        "download_bytes": plan_bytes(plan),
        "rates": list(plan.dropout.rates) if plan.dropout else None,
    }
    if isinstance(reply, Failure):
        return {**row, "reason": reply.reason}
    return {
        **row,
        "upload_bytes": payload_bytes(reply.tensors),
        "examples": reply.examples,
        "steps": reply.steps,
        "train_loss": reply.train_loss,
        "active_steps": list(reply.active_steps),
        "importance": list(reply.importance),
        "reward": reply.reward,
        **asdict(reply.cost),
    }


def round_row(
    plans: Sequence[Plan],
    replies: Sequence[Reply],
    framing: Sequence[tuple[int | None, int | None]],
    quality: Mapping[str, float | None],
    server_wall_s: float,
    evaluation_wall_s: float,
    saving_wall_s: float,
    host_wall_s: float,
) -> RoundRow:
    """Sum a round up.

    Args:
        framing: bytes sent to and received from each device, as the transport counted them.
    """
    updates = [reply for reply in replies if isinstance(reply, Update)]
    steps = sum(update.steps for update in updates)
    return RoundRow(
        round=plans[0].round,
        cohort=[plan.device for plan in plans],
        accepted=len(updates),
        failures=[asdict(reply) for reply in replies if isinstance(reply, Failure)],
        global_accuracy=quality["accuracy"],
        global_f1=quality["f1"],
        global_loss=quality["loss"],
        train_loss=_mean([update.train_loss for update in updates]),
        mean_active_layers=sum(sum(update.active_steps) for update in updates) / steps
        if steps
        else None,
        activation_bytes_peak=max((u.cost.activation_bytes_peak for u in updates), default=0),
        upload_bytes=sum(payload_bytes(update.tensors) for update in updates),
        download_bytes=sum(plan_bytes(plan) for plan in plans),
        round_measured_s=max((u.cost.turn_wall_s for u in updates), default=0.0) + server_wall_s,
        train_wall_s=sum(update.cost.train_wall_s for update in updates),
        evaluation_wall_s=evaluation_wall_s,
        saving_wall_s=saving_wall_s,
        host_wall_s=host_wall_s,
        upload_framed_bytes=_total([received for _, received in framing]),
        download_framed_bytes=_total([sent for sent, _ in framing]),
    )


def summarise(
    rows: Sequence[RoundRow], initial_accuracy: float, target: float | None
) -> dict[str, Any]:
    """Totals, bests and the time to the target over all rounds, under the rows' own names."""
    measured = [(row.global_accuracy, row.round) for row in rows if row.global_accuracy is not None]
    best, best_round = max(measured, default=(initial_accuracy, 0), key=lambda pair: pair[0])
    reached = target_round(rows, initial_accuracy, target)
    until = [row for row in rows if reached is not None and row.round <= reached]
    depth = [row.mean_active_layers for row in rows if row.mean_active_layers is not None]
    return {
        "rounds": len(rows),
        "initial_accuracy": initial_accuracy,
        "first_accuracy": measured[0][0] if measured else None,
        "best_accuracy": best,
        "best_round": best_round,
        "train_loss": rows[-1].train_loss if rows else None,
        "mean_active_layers": _mean(depth),
        "activation_bytes_peak": max((row.activation_bytes_peak for row in rows), default=0),
        "upload_bytes": sum(row.upload_bytes for row in rows),
        "download_bytes": sum(row.download_bytes for row in rows),
        "upload_framed_bytes": _total([row.upload_framed_bytes for row in rows]),
        "download_framed_bytes": _total([row.download_framed_bytes for row in rows]),
        "round_measured_s": sum(row.round_measured_s for row in rows),
        "train_wall_s": sum(row.train_wall_s for row in rows),
        "evaluation_wall_s": sum(row.evaluation_wall_s for row in rows),
        "host_wall_s": sum(row.host_wall_s for row in rows),
        "target": target,
        "target_round": reached,
        "time_to_target_measured_s": _sum_or_none(reached, [r.round_measured_s for r in until]),
        "time_to_target_host_s": _sum_or_none(
            reached, [row.host_wall_s - row.evaluation_wall_s for row in until]
        ),
    }


def target_round(
    rows: Sequence[RoundRow], initial_accuracy: float, target: float | None
) -> int | None:
    """First round at which the mean of the last three evaluations reaches the target."""
    if target is None:
        return None
    recent = [initial_accuracy]
    for row in rows:
        if row.global_accuracy is None:
            continue
        recent = [*recent, row.global_accuracy][-SMOOTHED_EVALUATIONS:]
        if len(recent) == SMOOTHED_EVALUATIONS and sum(recent) / len(recent) >= target - ROUNDING:
            return row.round
    return None


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a JSON Lines file and make them durable."""
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; a torn last line, as a crash may leave it, is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def rewind(path: Path, last_round: int) -> list[dict[str, Any]]:
    """Drop the rows of later rounds (their checkpoint was never written) and return the rest."""
    rows = [row for row in read_rows(path) if row["round"] <= last_round]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _sum_or_none(reached: int | None, values: Sequence[float]) -> float | None:
    return None if reached is None else sum(values)
