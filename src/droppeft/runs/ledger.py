"""The ledger of a run: one row per round, and one row per client and round.

Names of values tell their meaning. ``host`` values are measured in this process, ``measured`` ones
on a real clock. ``modelled`` values are computed for the clients' device profiles
(:mod:`droppeft.costs.modelled_clock`). ``_s`` is seconds, ``_bytes`` is bytes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from droppeft.costs.modelled_clock import ClientCost, RoundCost
from droppeft.files import as_json, sync
from droppeft.messages.encoding import tensor_bytes
from droppeft.messages.instruction import Instruction, instruction_bytes
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.runs.layers_by_mode import forward_and_skipped

SCHEMA_VERSION = 9


@dataclass(frozen=True)
class RoundRow:
    """One round, as a row of ``rounds.jsonl``.

    ``activation_bytes_peak``, the bytes and ``train_wall_s`` include late and surplus clients.

    Attributes:
        round: 1 for the first.
        cohort: clients that received an instruction.
        accepted: number of updates that were merged.
        failures: client and reason of each update that did not arrive, was refused or set aside.
        quality: of the global model with all layers, by ``global_`` and the metric, on the sample
            of test rows; ``None`` in a round without evaluation.
        diverged: whether the loss of the global model on the test rows is not finite.
        validation_loss: loss of the global model on validation rows of the same clients in every
            round; ``None`` if it was not measured.
        train_loss: mean over the steps of a client, then over accepted clients.
        mean_active_layers: layers that were trained per step, mean over all steps of accepted
            clients.
        mean_forward_layers, mean_skipped_layers: layers that ran forward only, and that were
            skipped, per step, mean over all steps of accepted clients.
        activation_bytes_peak: most bytes stored for the backward pass in a step of any client.
        upload_bytes, download_bytes: size of the tensors of all updates that passed validation, and
            of all instructions, those that ask for ``validation_loss`` included.
        round_measured_s: seconds as if clients trained in parallel: the slowest client that was
            accepted, plus the server.
        train_wall_s: seconds of training steps, summed over clients.
        evaluation_wall_s: seconds of evaluating the global model, by the server and by clients.
        saving_wall_s: seconds of writing the rows and the checkpoint of the round before. The time
            of saving this round is not known yet when its row is written.
        host_wall_s: seconds of the whole round in this process, with evaluation and saving.
        absent: clients that were drawn but not available, by their device profile.
        late: clients that missed the deadline on the modelled clock.
        surplus: clients that were in time, but after ``cohort_size`` others.
        set_aside: clients whose updates ``server.merge`` did not choose.
        clipped: clients whose change was scaled down, by ``server.clip_norm_multiple``.
        limited: clients whose weight was limited, by ``server.max_weight_multiple``.
        opposed: clients whose updates ``server.direction_check`` left out.
        round_modelled_s: seconds on the modelled clock until the last accepted update arrived, or
            until the deadline if the round lasted until then; ``None`` without a modelled clock.
        energy_modelled_j: energy of all clients that trained; ``None`` without a modelled clock.
        idle_modelled_share: part of the accepted clients' time that they wait for the slowest of
            them; ``None`` if unknown.
        coverage: per layer, number of merged updates that contain it.
        layer_steps: per layer, number of steps that trained it, summed over merged updates.
        importance: per layer, mean gradient norm over the merged updates that trained it; 0 if none
            did.
        notes: what the method reports about the round, such as the configurator's arms.
        epsilon: what all rounds so far have spent; ``None`` without differential privacy.
    """

    round: int
    cohort: list[int]
    accepted: int
    failures: list[dict[str, Any]]
    quality: Mapping[str, float | None]
    diverged: bool
    validation_loss: float | None
    train_loss: float | None
    mean_active_layers: float | None
    mean_forward_layers: float | None
    mean_skipped_layers: float | None
    activation_bytes_peak: int
    upload_bytes: int
    download_bytes: int
    round_measured_s: float
    train_wall_s: float
    evaluation_wall_s: float
    saving_wall_s: float
    host_wall_s: float
    absent: list[int]
    late: list[int]
    surplus: list[int]
    set_aside: list[int]
    clipped: list[int]
    limited: list[int]
    opposed: list[int]
    round_modelled_s: float | None
    energy_modelled_j: float | None
    idle_modelled_share: float | None
    coverage: list[int]
    layer_steps: list[int]
    importance: list[float]
    notes: dict[str, Any] | None
    epsilon: float | None = None

    def as_columns(self) -> dict[str, Any]:
        """Return the row as a flat mapping, with a column for each metric."""
        columns = asdict(self)
        quality: dict[str, float | None] = columns.pop("quality")
        return columns | quality

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> "RoundRow":
        """Return the row that :meth:`as_columns` describes."""
        names = {field.name for field in fields(cls)} - {"quality"}
        of_row = {name: columns[name] for name in names}
        rest = {name: value for name, value in columns.items() if name not in names}
        return cls(**of_row, quality=rest)

    def as_saved(self) -> "RoundRow":
        """Return the row as it would be read from the file, where numbers are finite or null.

        A run that is resumed therefore continues from the same values as one that was never
        stopped.
        """
        return self.from_columns(json.loads(as_json(self.as_columns())))


@dataclass(frozen=True)
class RoundEvaluation:
    """The evaluation of the global model after a round.

    Attributes:
        quality: on the sample of test rows, by the names of the columns.
        wall_s: seconds that all of it took.
        diverged: whether the loss on these rows is not finite.
        validation_loss: on clients' validation rows; ``None`` if it was not measured.
        download_bytes: bytes of the instructions that asked for ``validation_loss``.
    """

    quality: Mapping[str, float | None]
    wall_s: float = 0.0
    diverged: bool = False
    validation_loss: float | None = None
    download_bytes: int = 0


@dataclass(frozen=True)
class ClosedRound:
    """A round after it was merged.

    Attributes:
        round: 1 for the first.
        instructions: in the order of the cohort.
        checked_replies: in the same order, after validation: refused updates are failures here.
        replies: in the same order, as they were merged: updates that were late, surplus or below
            the quorum are failures too.
        modelled: cost of the round on the modelled clock.
        server_wall_s: seconds of writing instructions, validation and merging on the server.
        clipped: by client whose change was scaled down, the smallest factor of any layer.
        limited: clients whose weight was limited.
        opposed: clients whose updates were left out for the direction of their changes.
        agreement: by client, how far its changes agreed with those of the others so far.
        set_aside: clients whose updates the merge rule did not choose.
    """

    round: int
    instructions: tuple[Instruction, ...]
    checked_replies: tuple[Reply, ...]
    replies: tuple[Reply, ...]
    modelled: RoundCost
    server_wall_s: float
    clipped: Mapping[int, float] = field(default_factory=dict)
    limited: tuple[int, ...] = ()
    opposed: tuple[int, ...] = ()
    agreement: Mapping[int, float] = field(default_factory=dict)
    set_aside: tuple[int, ...] = ()

    @property
    def accepted(self) -> tuple[Update, ...]:
        """The updates that were merged, in the order of the instructions."""
        return tuple(reply for reply in self.replies if isinstance(reply, Update))


def client_row(
    instruction: Instruction,
    checked_reply: Reply,
    reply: Reply,
    modelled: ClientCost | None,
    private: bool = False,
    clip_factor: float | None = None,
    agreement: float | None = None,
) -> dict[str, Any]:
    """Describe one client's local training in a row of ``clients.jsonl``.

    Args:
        instruction: what the client was asked to do.
        checked_reply: its reply after validation.
        reply: its reply as it was merged; a failure has the reason why it was not.
        modelled: its cost on the modelled clock, if it sent an update.
        private: whether values that follow from the client's rows are left out.
        clip_factor: the smallest factor by which its change was scaled down, if it was.
        agreement: how far its changes agreed with those of the others so far, if it is known.
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
    if clip_factor is not None and not private:
        row["clip_factor"] = clip_factor
    if agreement is not None:
        row["agreement"] = agreement
    if private and isinstance(checked_reply, Update):
        return row | {"upload_bytes": tensor_bytes(checked_reply.tensors, instruction.encoding)}
    if isinstance(checked_reply, Update):
        row |= _training_columns(instruction, checked_reply)
    return row if modelled is None else {**row, **_modelled_columns(modelled)}


def _training_columns(instruction: Instruction, update: Update) -> dict[str, Any]:
    return {
        "upload_bytes": tensor_bytes(update.tensors, instruction.encoding),
        "examples": update.examples,
        "targets": update.targets,
        "steps": update.steps,
        "train_loss": update.train_loss,
        "active_steps": list(update.active_steps),
        "importance": list(update.importance),
        "shared": None if update.shared is None else list(update.shared),
        "scores": None if update.scores is None else list(update.scores),
        "reward": update.reward,
        **asdict(update.cost),
        "layer_tokens": list(update.cost.layer_tokens),
        "forward_tokens": list(update.cost.forward_tokens),
    }


def _modelled_columns(cost: ClientCost) -> dict[str, Any]:
    return {
        "profile": cost.profile,
        "download_modelled_s": cost.download_s,
        "train_modelled_s": cost.train_s,
        "reward_modelled_s": cost.reward_s,
        "upload_modelled_s": cost.upload_s,
        "client_modelled_s": cost.total_s,
        "energy_modelled_j": cost.energy_j,
    }


def round_row(
    closed: ClosedRound,
    evaluation: RoundEvaluation,
    saving_wall_s: float,
    host_wall_s: float,
    notes: Mapping[str, Any] | None = None,
) -> RoundRow:
    """Summarise a round in a row of ``rounds.jsonl``.

    Args:
        closed: the round.
        evaluation: of the global model.
        saving_wall_s: seconds of writing the rows and the checkpoint of the round before.
        host_wall_s: seconds of the whole round in this process.
        notes: what the method reports about the round.
    """
    received = [reply for reply in closed.checked_replies if isinstance(reply, Update)]
    updates, modelled = closed.accepted, closed.modelled
    steps = sum(update.steps for update in updates)
    forward, skipped = forward_and_skipped(closed.instructions, closed.replies)
    slowest_s = max((update.cost.total_wall_s for update in updates), default=0.0)
    return RoundRow(
        round=closed.round,
        cohort=[instruction.client for instruction in closed.instructions],
        accepted=len(updates),
        failures=_failures(closed),
        quality=evaluation.quality,
        diverged=evaluation.diverged,
        validation_loss=evaluation.validation_loss,
        train_loss=mean_or_none([update.train_loss for update in updates]),
        mean_active_layers=sum(sum(update.active_steps) for update in updates) / steps
        if steps
        else None,
        mean_forward_layers=forward,
        mean_skipped_layers=skipped,
        activation_bytes_peak=max((u.cost.activation_bytes_peak for u in received), default=0),
        upload_bytes=_upload_bytes(closed),
        download_bytes=sum(map(instruction_bytes, closed.instructions)) + evaluation.download_bytes,
        round_measured_s=slowest_s + closed.server_wall_s,
        train_wall_s=sum(update.cost.train_wall_s for update in received),
        evaluation_wall_s=evaluation.wall_s,
        saving_wall_s=saving_wall_s,
        host_wall_s=host_wall_s,
        absent=list(modelled.absent),
        late=list(modelled.late),
        surplus=list(modelled.surplus),
        set_aside=list(closed.set_aside),
        clipped=list(closed.clipped),
        limited=list(closed.limited),
        opposed=list(closed.opposed),
        round_modelled_s=modelled.round_s,
        energy_modelled_j=modelled.energy_j,
        idle_modelled_share=_idle_share(modelled, closed.replies),
        coverage=_coverage(closed.instructions, updates),
        layer_steps=[sum(layer) for layer in zip(*(u.active_steps for u in updates), strict=True)],
        importance=_importance(updates),
        notes=None if notes is None else dict(notes),
    )


def private_row(row: RoundRow, epsilon: float) -> RoundRow:
    """Return a row without what follows from rows of clients, and with the epsilon spent so far.

    Seconds, bytes and the clients that took part stay.
    """
    return replace(
        row,
        train_loss=None,
        mean_active_layers=None,
        mean_forward_layers=None,
        mean_skipped_layers=None,
        round_modelled_s=None,
        energy_modelled_j=None,
        idle_modelled_share=None,
        layer_steps=[],
        importance=[],
        epsilon=epsilon,
    )


def _upload_bytes(closed: ClosedRound) -> int:
    """Bytes of all updates that arrived, merged or not."""
    return sum(
        tensor_bytes(reply.tensors, instruction.encoding)
        for instruction, reply in zip(closed.instructions, closed.checked_replies, strict=True)
        if isinstance(reply, Update)
    )


def _failures(closed: ClosedRound) -> list[dict[str, Any]]:
    """Client and reason of each failure, without late, surplus, set aside and opposed clients."""
    modelled, set_aside = closed.modelled, (*closed.set_aside, *closed.opposed)
    explained = (*modelled.late, *modelled.surplus, *set_aside)
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
    return [mean_or_none([norm for norm in norms if norm > 0]) or 0.0 for norms in by_layer]


def _idle_share(modelled: RoundCost, replies: Sequence[Reply]) -> float | None:
    pairs = zip(modelled.clients, replies, strict=True)
    seconds = [cost.total_s for cost, reply in pairs if cost and isinstance(reply, Update)]
    if not seconds or max(seconds) <= 0:
        return None
    return 1 - sum(seconds) / (len(seconds) * max(seconds))


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file, and sync it to disk."""
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.writelines(as_json(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean, or ``None`` of no values."""
    return sum(values) / len(values) if values else None
