"""A whole run: start it in a folder, run its rounds, and write its result.

At every moment, the folder holds a configuration, complete checkpoints and complete rows. A run
that is resumed from a checkpoint after a crash therefore ends as it would have without the crash.
"""

import math
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from droppeft.cached_layers.cached_layers import state_folder
from droppeft.client.client_state import state_dir
from droppeft.client.rounding_errors import forget_errors
from droppeft.client.run_inputs import ReadData, count_clients, read_data
from droppeft.config import Config
from droppeft.errors import DroppeftError, Interrupted
from droppeft.files import as_json, write_atomically
from droppeft.messages.server_state import ServerState
from droppeft.methods import method_named
from droppeft.methods.rules import check_settings
from droppeft.models.hardware import resolve_here
from droppeft.quantities import counted
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.conclusion import conclude, trend_of
from droppeft.runs.environment import machine, versions
from droppeft.runs.folder import CLIENTS, RESULT, ROUNDS, begin, check_free, locked
from droppeft.runs.ledger import (
    SCHEMA_VERSION,
    ClosedRound,
    RoundEvaluation,
    RoundRow,
    append_rows,
    client_row,
    private_row,
    round_row,
)
from droppeft.runs.listener import Listener
from droppeft.runs.summary import summarise
from droppeft.runs.trackers import check_tracker, tracked
from droppeft.server.delivered_round import best_round, validate
from droppeft.server.description import describe, initial_facts
from droppeft.server.expected_time import estimate_wall_s
from droppeft.server.final_evaluation import evaluate_final_models
from droppeft.server.finite_models import evaluated_round, evaluated_state
from droppeft.server.global_evaluation import evaluate_global
from droppeft.server.prepare import Prepared, prepare, with_workers
from droppeft.server.privacy_accountant import epsilon_spent, with_noise_multiplier
from droppeft.server.privacy_releases import check_next_round, releases
from droppeft.server.rounds import refuse_round, run_round
from droppeft.server.start_values import check_start, with_start_values
from droppeft.tasks.metrics import quality as quality_of
from droppeft.transports.base import Connect, Transport
from droppeft.transports.encoding import EncodingTransport
from droppeft.transports.registry import transport_named

MAX_LOST_ROUNDS = 3
"""A run ends after this many rounds in a row in which no update was merged."""


def start_run(
    config: Config,
    out: Path,
    listener: Listener,
    connect: Connect | None = None,
    read: ReadData | None = None,
) -> dict[str, Any]:
    """Run a configuration in a new folder and return the content of its ``result.json``.

    Args:
        config: of the run.
        out: folder of the run; it must be new or empty.
        listener: is told about the progress of the run.
        connect: opens the transport; by default the one that the configuration names.
        read: data that have been read, which are used if they are those of the configuration.

    Raises:
        DroppeftError: the configuration cannot be run or the folder is not empty (nothing has been
            written then), or a round or the final evaluation failed (the folder remains then).
        Interrupted: on Ctrl-C after the folder was created.
    """
    check_settings(config)
    check_free(out)
    state_dir()  # raises here, before round 1, if clients could not save their state
    out = out.resolve()
    config, read = _resolved(config, listener, read)
    prepared = _started(prepare(config, listener.preparing, secrets.token_hex(8), read))
    with reach_clients(prepared, connect, listener) as (prepared, transport):
        listener.preparing("measuring the model before training")
        evaluation = evaluate_global(prepared, prepared.state.model, prepared.sample)
        if not math.isfinite(evaluation.loss):
            raise DroppeftError(
                f"the loss of model {config.model} is not finite before training: its weights are "
                f"damaged, or training.precision={config.training.precision} is too coarse for it"
            )
        first = Checkpoint(0, prepared.state, initial_facts(prepared, evaluation))
        begin(out, prepared.config, first)
        expected = estimate_wall_s(prepared, evaluation)
        with locked(out):
            return run_rounds(prepared, transport, first, [], out, listener, expected)


def _resolved(
    config: Config, listener: Listener, read: ReadData | None
) -> tuple[Config, ReadData | None]:
    """Replace what depends on machine and data by its value, and apply the method's changes.

    Returns:
        The configuration, and the data if they have been read.
    """
    config = resolve_here(config)
    if config.start_from is not None:
        check_start(config.start_from)
    if not config.clients:
        listener.preparing("counting owners")
        read = read_data(config, read)
        config = count_clients(config, read)
        check_settings(config)
    return with_noise_multiplier(method_named(config.method).adjust(config)), read


def _started(prepared: Prepared) -> Prepared:
    """Return the server with the values that ``start_from`` names, if it names any."""
    folder, setup = prepared.config.start_from, prepared.setup
    if folder is None:
        return prepared
    state = with_start_values(folder, prepared.loaded, prepared.method, setup, prepared.state)
    return replace(prepared, state=state)


@contextmanager
def reach_clients(
    prepared: Prepared, connect: Connect | None, listener: Listener
) -> Iterator[tuple[Prepared, Transport]]:
    """Open the transport, with ``connect`` if it is given, and let its workers evaluate too."""
    check_tracker(prepared.config.tracker)
    listener.preparing("reaching the clients")
    opened = (connect or transport_named(prepared.config.transport))(prepared.loaded)
    with opened as transport:
        prepared = with_workers(prepared, transport)
        yield prepared, EncodingTransport(transport, prepared.setup.layout)


def run_rounds(
    prepared: Prepared,
    transport: Transport,
    last: Checkpoint,
    rows: list[RoundRow],
    out: Path,
    listener: Listener,
    expected_wall_s: float | None = None,
) -> dict[str, Any]:
    """Run all rounds that are left, then write and return the result.

    Args:
        last: the checkpoint to continue from.
        rows: the rounds up to that checkpoint.
        expected_wall_s: estimate of the seconds that it will take, for the listener.
    """
    saving_wall_s = 0.0
    with tracked(listener, prepared.config, out) as listener:
        try:
            about = describe(prepared, last.facts)
            here = {
                "expected_wall_s": expected_wall_s,
                "workers": prepared.loaded.workers,
                "why_fewer_workers": prepared.why_fewer_workers,
            }
            listener.started({**about, **here}, list(rows))
            for _ in range(last.round, prepared.config.rounds):
                check_next_round(prepared.config, last.facts, last.round + 1, out)
                checkpoint, row, client_rows = _run_one_round(
                    prepared, transport, last, saving_wall_s, listener, rows, out
                )
                rows.append(row)
                saving_wall_s = _save(out, checkpoint, rows, client_rows)
                last = checkpoint
                listener.round_done(row)
                _check_not_lost(rows, prepared.config.rounds, out)
            # Once more, for a run that is resumed when all its rounds are done.
            _check_not_lost(rows, prepared.config.rounds, out)
            return _finish(prepared, transport, last, rows, out, listener)
        except KeyboardInterrupt:
            raise Interrupted(out, last.round) from None


def _check_not_lost(rows: list[RoundRow], rounds: int, out: Path) -> None:
    """Raise if no update was merged in the last rounds, or in any round of a run that is over."""
    is_over = len(rows) == rounds
    recent = rows if is_over else rows[-MAX_LOST_ROUNDS:]
    # With differential privacy, a round may by chance have nobody.
    fine = any(row.accepted or not (row.cohort or row.absent) for row in recent)
    if fine or len(recent) < min(MAX_LOST_ROUNDS, rounds):
        return
    next_step = "start a new run" if is_over else f"resume {out}"
    raise DroppeftError(
        f"no update could be merged in {counted(len(recent), 'round')} in a row "
        f"({_why_none_merged(recent[-1])}); correct this, then {next_step}"
    )


def _why_none_merged(row: RoundRow) -> str:
    """Why no update of a round was merged, with one client as an example."""
    if row.failures:
        last = row.failures[-1]
        return f"client {last['client']}: {last['reason']}"
    if row.late:
        return f"client {row.late[-1]} took longer than clock.deadline_s on the modelled clock"
    return "no client was available, by the availability of their device profiles"


def _run_one_round(
    prepared: Prepared,
    transport: Transport,
    last: Checkpoint,
    saving_wall_s: float,
    listener: Listener,
    rows: Sequence[RoundRow],
    out: Path,
) -> tuple[Checkpoint, RoundRow, list[dict[str, Any]]]:
    """Run and evaluate one round; return its checkpoint, its row and its clients' rows.

    If the loss of the merged model is not finite, the round is refused, and the state is that of
    the last evaluated round.

    Args:
        last: the checkpoint of the round before.
        saving_wall_s: seconds that saving the round before took.
        rows: of the rounds before.
        out: folder of the run.
    """
    start = time.perf_counter()
    round = last.round + 1
    state, closed = run_round(
        prepared.setup, prepared.method, transport, last.state, round, listener.replied
    )
    evaluation = _evaluate_round(prepared, transport, state, round)
    if evaluation.diverged:
        state, closed = _refused(prepared, evaluated_state(prepared, last, rows, out), closed)
    row = round_row(
        closed,
        evaluation,
        saving_wall_s,
        time.perf_counter() - start + saving_wall_s,
        prepared.method.note(prepared.setup, state),
    )
    privacy = prepared.config.privacy
    if privacy.is_on:
        row = private_row(row, epsilon_spent(prepared.config, releases(last.facts, round)))
    client_rows = [
        client_row(
            *parts,
            privacy.is_on,
            closed.clipped.get(parts[0].client),
            closed.agreement.get(parts[0].client),
        )
        for parts in zip(
            closed.instructions,
            closed.checked_replies,
            closed.replies,
            closed.modelled.clients,
            strict=True,
        )
    ]
    return Checkpoint(round, state, last.facts), row.as_saved(), client_rows


def _refused(
    prepared: Prepared, state: ServerState, closed: ClosedRound
) -> tuple[ServerState, ClosedRound]:
    """Return the state after a round of which nothing is merged, and that round.

    Args:
        state: the state to which the run returns.
        closed: the round.
    """
    state, replies = refuse_round(
        prepared.setup,
        prepared.method,
        state,
        closed.instructions,
        closed.replies,
        "the losses of its model",
    )
    return state, replace(closed, replies=tuple(replies))


def _save(
    out: Path, checkpoint: Checkpoint, rows: list[RoundRow], client_rows: list[dict[str, Any]]
) -> float:
    """Save the last round and return the seconds that it took.

    The checkpoint comes last: rows without their checkpoint are removed when a run is resumed.

    Args:
        rows: of all rounds.
    """
    start = time.perf_counter()
    append_rows(out / CLIENTS, client_rows)
    append_rows(out / ROUNDS, [rows[-1].as_columns()])
    best = best_round(rows)
    # Round 0 has values that no seed gives if the run began with those of another adapter.
    kept = {0, best.round if best else 0, evaluated_round(rows)}
    checkpoints.save(out / "checkpoints", checkpoint, kept)
    return time.perf_counter() - start


def _evaluate_round(
    prepared: Prepared, transport: Transport, state: ServerState, round: int
) -> RoundEvaluation:
    """Evaluate the global model on the sample of test rows, and on clients' validation rows.

    The values are ``None`` if no evaluation is due.
    """
    config, metrics = prepared.config, prepared.loaded.task.metrics
    is_due = round % config.evaluation.every == 0 or round == config.rounds
    if not (is_due and prepared.method.has_global_model(config)):
        return RoundEvaluation(quality_of("global", metrics, None))
    evaluation = evaluate_global(prepared, state.model, prepared.sample)
    validation = validate(prepared.setup, transport, state, round)
    return RoundEvaluation(
        quality_of("global", metrics, evaluation.metrics),
        evaluation.wall_s + validation.wall_s,
        not math.isfinite(evaluation.loss),
        validation.loss,
        validation.download_bytes,
    )


def _finish(
    prepared: Prepared,
    transport: Transport,
    last: Checkpoint,
    rows: list[RoundRow],
    out: Path,
    listener: Listener,
) -> dict[str, Any]:
    """Evaluate the final models, write the adapter and ``result.json``, and return the result."""
    final = evaluate_final_models(prepared, transport, last, rows, out, listener)
    result = {
        "schema_version": SCHEMA_VERSION,
        **describe(prepared, last.facts),
        **summarise(rows, last.facts["initial"], prepared.metric, prepared.config.target),
        **final,
        "prepare_wall_s": prepared.prepare_wall_s,
        "versions": versions(),
        "machine": machine(prepared.config.accelerator),
    }
    trend = trend_of(result, rows)
    result |= {"conclusion": conclude(result, rows, trend), "trend": trend.kind if trend else None}
    write_atomically(out / RESULT, (as_json(result, indent=2) + "\n").encode())
    shutil.rmtree(state_folder(prepared.setup.run), ignore_errors=True)
    forget_errors(prepared.setup.run)
    listener.finished(result)
    return result
