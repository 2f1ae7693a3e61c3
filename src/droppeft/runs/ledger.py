"""The record of a run: one row per round, one per client and round, one result at the end.

Names say what they hold: ``host`` is this process, ``measured`` a real clock, ``_s`` seconds,
``_bytes`` bytes; ``modelled`` stands for clients that are not here (:mod:`droppeft.costs.modelled_clock`).
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from droppeft.costs.modelled_clock import RoundCost, ClientCost
from droppeft.files import sync, write_atomically
from droppeft.messages import Failure, Instruction, Reply, Update, payload_bytes, instruction_bytes

SCHEMA_VERSION = 3
ROUNDING = 1e-9
SMOOTHED_EVALUATIONS = 3
"""A target counts as reached when the mean of so many evaluations in a row reaches it."""


@dataclass(frozen=True)
class RoundRow:
    """One round.

    Attributes:
        round: 1 for the first.
        cohort: clients that were asked.
        accepted: how many of their Updates were merged.
        failures: client and reason of those whose Updates did not come, were refused or set aside.
        global_accuracy, global_f1, global_loss: of the merged model at full depth on the fixed
            sample of test rows; ``None`` in a round that was not evaluated.
        train_loss: mean over accepted clients of their mean over steps.
        mean_active_layers: layers run per step, mean over all steps of accepted clients.
        activation_bytes_peak: most bytes stored for backward in any step of any client. This, the
            bytes and ``train_wall_s`` count late and surplus clients too.
        upload_bytes, download_bytes: tensors that travelled, without a transport's framing.
        round_measured_s: as if clients worked side by side: the slowest turn plus the server.
        train_wall_s: training steps of all clients together.
        evaluation_wall_s: measuring the merged model, for this report only.
        saving_wall_s: writing the rows and checkpoint of the round before (this row is part of
            what is written now, so its own saving is not known yet).
        host_wall_s: the whole round in this process, evaluation and that saving included.
        upload_framed_bytes, download_framed_bytes: what the transport really carried, its
            framing of messages included and that of the network not; ``None`` where clients are in
            this process. They count what was refused or set aside, and not what was never sent;
            ``upload_bytes`` and ``download_bytes`` follow from Updates that could be checked,
            merged or not, and from all instructions.
        absent: clients that were drawn and were not there, by the availability of their profile.
        late: clients that missed the modelled deadline.
        surplus: clients in time when a cohort of others had been faster on the modelled clock.
        round_modelled_s: slowest merged turn on the clients' profiles, or the deadline that the
            round waited for.
        energy_modelled_j: of all clients that trained. These five are unknown for rounds that an
            earlier version played.
        idle_modelled_share: of the merged clients' time until the slowest of them is done, the part
            in which they wait for it.
        coverage: of each layer, how many merged Updates brought it.
        layer_steps: of each layer, in how many steps of the merged turns it ran; unknown for rounds
            that an earlier version played.
        importance: of each layer, mean gradient norm of the merged turns that moved it; 0 where
            none did.
        notes: what the method says of the round; of `droppeft` the configurator's arms.
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
    absent: list[int] | None = None
    late: list[int] | None = None
    surplus: list[int] | None = None
    round_modelled_s: float | None = None
    energy_modelled_j: float | None = None
    idle_modelled_share: float | None = None
    coverage: list[int] | None = None
    layer_steps: list[int] | None = None
    importance: list[float] | None = None
    notes: dict[str, Any] | None = None


@dataclass(frozen=True)
class ClosedRound:
    """A round after its last reply.

    Attributes:
        round: 1 for the first.
        plans: in cohort order.
        answers: in the same order, refused Updates replaced by their Failure.
        replies: those that may be merged, the others replaced by a Failure.
        modelled: the round on the modelled clock.
        framing: bytes sent to and received from each client in order of arrival, as the transport
            counted them.
        server_wall_s: planning, checking and merging on the server.
    """

    round: int
    instructions: tuple[Instruction, ...]
    answers: tuple[Reply, ...]
    replies: tuple[Reply, ...]
    modelled: RoundCost
    framing: tuple[tuple[int | None, int | None], ...]
    server_wall_s: float

    @property
    def accepted(self) -> tuple[Update, ...]:
        """The Updates that were merged, in the order of the instructions."""
        return tuple(reply for reply in self.replies if isinstance(reply, Update))


def client_row(instruction: Instruction, answer: Reply, reply: Reply, turn: ClientCost | None) -> dict[str, Any]:
    """One client's turn as a row of ``clients.jsonl``; one that was not merged has a reason.

    Args:
        answer: what came and was found in order.
        reply: what of it was merged.
        turn: its modelled cost, if there is an Update.
    """
    row: dict[str, Any] = {
        "round": instruction.round,
        "client": instruction.client,
        "accepted": isinstance(reply, Update),
        "download_bytes": instruction_bytes(instruction),
        "rates": list(instruction.dropout.rates) if instruction.dropout else None,
    }
    if isinstance(reply, Failure):
        row["reason"] = reply.reason
    if isinstance(answer, Update):
        row |= _work(answer)
    return row if turn is None else {**row, **_modelled(turn)}


def _work(update: Update) -> dict[str, Any]:
    return {
        "upload_bytes": payload_bytes(update.tensors),
        "examples": update.examples,
        "steps": update.steps,
        "train_loss": update.train_loss,
        "active_steps": list(update.active_steps),
        "importance": list(update.importance),
        "shared": None if update.shared is None else list(update.shared),
        "scores": None if update.scores is None else list(update.scores),
        "reward": update.reward,
        **asdict(update.cost),
        "layer_tokens": list(update.cost.layer_tokens),
    }


def _modelled(turn: ClientCost) -> dict[str, Any]:
    return {
        "profile": turn.profile,
        "download_modelled_s": turn.download_s,
        "train_modelled_s": turn.train_s,
        "reward_modelled_s": turn.reward_s,
        "upload_modelled_s": turn.upload_s,
        "client_modelled_s": turn.total_s,
        "energy_modelled_j": turn.energy_j,
    }


def round_row(
    closed: ClosedRound,
    quality: Mapping[str, float | None],
    saving_wall_s: float,
    host_wall_s: float,
    notes: Mapping[str, Any] | None = None,
) -> RoundRow:
    """Sum a round up.

    Args:
        quality: loss, accuracy and F1 of the merged model, and the seconds that measuring took.
        saving_wall_s: writing the rows and checkpoint of the round before.
        host_wall_s: the whole round in this process.
        notes: what the method says of it.
    """
    came = [answer for answer in closed.answers if isinstance(answer, Update)]
    updates, modelled = closed.accepted, closed.modelled
    steps = sum(update.steps for update in updates)
    slowest_s = max((update.cost.total_wall_s for update in updates), default=0.0)
    return RoundRow(
        round=closed.round,
        cohort=[instruction.client for instruction in closed.instructions],
        accepted=len(updates),
        failures=_failures(closed),
        global_accuracy=quality["accuracy"],
        global_f1=quality["f1"],
        global_loss=quality["loss"],
        train_loss=_mean([update.train_loss for update in updates]),
        mean_active_layers=sum(sum(update.active_steps) for update in updates) / steps
        if steps
        else None,
        activation_bytes_peak=max((u.cost.activation_bytes_peak for u in came), default=0),
        upload_bytes=sum(payload_bytes(update.tensors) for update in came),
        download_bytes=sum(instruction_bytes(instruction) for instruction in closed.instructions),
        round_measured_s=slowest_s + closed.server_wall_s,
        train_wall_s=sum(update.cost.train_wall_s for update in came),
        evaluation_wall_s=quality["wall_s"] or 0.0,
        saving_wall_s=saving_wall_s,
        host_wall_s=host_wall_s,
        upload_framed_bytes=_total([received for _, received in closed.framing]),
        download_framed_bytes=_total([sent for sent, _ in closed.framing]),
        absent=list(modelled.absent),
        late=list(modelled.late),
        surplus=list(modelled.surplus),
        round_modelled_s=modelled.round_s,
        energy_modelled_j=modelled.energy_j,
        idle_modelled_share=_idle_share(modelled, closed.replies),
        coverage=_coverage(closed.instructions, updates),
        layer_steps=[sum(layer) for layer in zip(*(u.active_steps for u in updates), strict=True)],
        importance=_importance(updates),
        notes=None if notes is None else dict(notes),
    )


def _failures(closed: ClosedRound) -> list[dict[str, Any]]:
    """Those that neither the deadline nor over-selection explains."""
    explained = (*closed.modelled.late, *closed.modelled.surplus)
    return [
        {"client": reply.client, "reason": reply.reason}
        for reply in closed.replies
        if isinstance(reply, Failure) and reply.client not in explained
    ]


def _coverage(instructions: Sequence[Instruction], updates: Sequence[Update]) -> list[int]:
    layers = max((len(instruction.adapter.layers) for instruction in instructions), default=0)
    return [sum(layer in update.tensors for update in updates) for layer in range(layers)]


def _importance(updates: Sequence[Update]) -> list[float]:
    by_layer = zip(*(update.importance for update in updates), strict=True)
    return [_mean([norm for norm in norms if norm > 0]) or 0.0 for norms in by_layer]


def _idle_share(modelled: RoundCost, replies: Sequence[Reply]) -> float | None:
    turns = zip(modelled.clients, replies, strict=True)
    seconds = [turn.total_s for turn, reply in turns if turn and isinstance(reply, Update)]
    if not seconds or max(seconds) <= 0:
        return None
    return 1 - sum(seconds) / (len(seconds) * max(seconds))


def summarise(
    rows: Sequence[RoundRow], initial_accuracy: float, target: float | None
) -> dict[str, Any]:
    """Totals, bests and the time to the target over all rounds, under the rows' own names."""
    measured = [(row.global_accuracy, row.round) for row in rows if row.global_accuracy is not None]
    best, best_round = max(measured, default=(None, None), key=lambda pair: pair[0])
    evaluations = [(row.round, row.global_accuracy) for row in rows]
    reached = target_round(evaluations, initial_accuracy, target)
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
        "round_modelled_s": _whole([row.round_modelled_s for row in rows]),
        "energy_modelled_j": _whole([row.energy_modelled_j for row in rows]),
        "idle_modelled_share": _mean(
            [row.idle_modelled_share for row in rows if row.idle_modelled_share is not None]
        ),
        "train_wall_s": sum(row.train_wall_s for row in rows),
        "evaluation_wall_s": sum(row.evaluation_wall_s for row in rows),
        "host_wall_s": sum(row.host_wall_s for row in rows),
        "target": target,
        "target_round": reached,
        "time_to_target_measured_s": _sum_or_none(reached, [r.round_measured_s for r in until]),
        "time_to_target_modelled_s": _whole([row.round_modelled_s for row in until])
        if reached
        else None,
        "time_to_target_host_s": _sum_or_none(
            reached, [row.host_wall_s - row.evaluation_wall_s for row in until]
        ),
    }


def target_round(
    evaluations: Iterable[tuple[int, float | None]], initial_accuracy: float, target: float | None
) -> int | None:
    """First round at which the mean of the last three evaluations reaches the target.

    Args:
        evaluations: rounds and their accuracies, ``None`` where there was no evaluation.
    """
    if target is None:
        return None
    recent = [initial_accuracy]
    for round, accuracy in evaluations:
        if accuracy is None:
            continue
        recent = [*recent, accuracy][-SMOOTHED_EVALUATIONS:]
        if len(recent) == SMOOTHED_EVALUATIONS and sum(recent) / len(recent) >= target - ROUNDING:
            return round
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


def _whole(values: Sequence[float | None]) -> float | None:
    """The sum, if all are known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _sum_or_none(reached: int | None, values: Sequence[float]) -> float | None:
    return None if reached is None else sum(values)
