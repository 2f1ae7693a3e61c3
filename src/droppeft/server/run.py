"""A whole run: start or resume it in a folder, run its rounds, and write its result.

At every moment, the folder holds a configuration, complete checkpoints and complete rows. A run
that is resumed from a checkpoint after a crash therefore ends as it would have without the crash.
"""

import json
import math
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.adapters.by_layer import count_parameters, set_tensors
from droppeft.cached_layers.cached_layers import state_folder
from droppeft.client.client_state import state_dir
from droppeft.client.run_inputs import count_clients, difference, identity
from droppeft.config import Config, as_tree, load_config, resolve
from droppeft.data.texts import Rows
from droppeft.errors import DroppeftError, Interrupted
from droppeft.files import write_atomically
from droppeft.messages import GlobalModel, ServerState
from droppeft.methods import method_named
from droppeft.methods.rules import check_settings
from droppeft.quantities import counted
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.conclusion import conclude, trend_of
from droppeft.runs.environment import machine, versions
from droppeft.runs.folder import (
    CLIENTS,
    CONFIG,
    GENERATED,
    RESULT,
    ROUNDS,
    begin,
    check_free,
    locked,
    read_result,
    save_extended,
    with_more_rounds,
)
from droppeft.runs.ledger import (
    SCHEMA_VERSION,
    RoundEvaluation,
    RoundRow,
    append_rows,
    client_row,
    read_rows,
    rewind,
    round_row,
    summarise,
)
from droppeft.runs.listener import Listener
from droppeft.runs.model_files import write_adapter
from droppeft.runs.trackers import check_tracker, tracked
from droppeft.server.client_evaluation import ClientEvaluation, evaluate_clients, summarise_clients
from droppeft.server.delivered_round import best_round, delivered_round, validate
from droppeft.server.expected_time import estimate_wall_s, final_rows
from droppeft.server.generated_texts import as_lines, written_before_and_after
from droppeft.server.prepare import (
    Prepared,
    evaluation_sample,
    prepare,
    references,
    writes_texts,
)
from droppeft.server.rounds import run_round
from droppeft.server.start_values import check_start, with_start_values
from droppeft.tasks.metrics import Metric
from droppeft.tasks.metrics import quality as quality_of
from droppeft.training.loop import Evaluation, evaluate
from droppeft.transports.base import Connect, Transport
from droppeft.transports.registry import transport_named

MAX_LOST_ROUNDS = 3
"""A run ends after this many rounds in a row in which no update was merged."""


def start_run(
    config: Config, out: Path, listener: Listener, connect: Connect | None = None
) -> dict[str, Any]:
    """Run a configuration in a new folder and return the content of its ``result.json``.

    Args:
        config: of the run.
        out: folder of the run; it must be new or empty.
        listener: is told about the progress of the run.
        connect: opens the transport; by default the one that the configuration names.

    Raises:
        DroppeftError: the configuration cannot be run or the folder is not empty (nothing has been
            written then), or a round or the final evaluation failed (the folder remains then).
        Interrupted: on Ctrl-C after the folder was created.
    """
    check_settings(config)
    check_free(out)
    state_dir()  # raises here, before round 1, if clients could not save their state
    out = out.resolve()
    config = _resolved(config, listener)
    prepared = _started(prepare(config, listener.preparing, secrets.token_hex(8)))
    with _connect(prepared, connect, listener) as transport:
        listener.preparing("measuring the references")
        evaluation = _evaluate(prepared, prepared.state.model, prepared.sample)
        if not math.isfinite(evaluation.loss):
            raise DroppeftError(
                f"the loss of model {config.model} is not finite before training: its weights are "
                f"damaged, or training.precision={config.training.precision} is too coarse for it"
            )
        first = Checkpoint(0, prepared.state, _initial_facts(prepared, evaluation))
        begin(out, prepared.config, first)
        again = _evaluate(prepared, prepared.state.model, prepared.sample[::4])
        expected = estimate_wall_s(prepared, evaluation, again)
        with locked(out):
            return _run_rounds(prepared, transport, first, [], out, listener, expected)


def _resolved(config: Config, listener: Listener) -> Config:
    """Replace what depends on machine and data by its value, and apply the method's changes."""
    config = resolve(config, cuda=torch.cuda.is_available())
    if config.start_from is not None:
        check_start(config.start_from)
    if not config.clients:
        listener.preparing("counting owners")
        config = count_clients(config)
        check_settings(config)
    return method_named(config.method).adjust(config)


def resume_run(
    out: Path, listener: Listener, connect: Connect | None = None, rounds: int | None = None
) -> dict[str, Any]:
    """Continue a run from its newest checkpoint and return the content of its ``result.json``.

    If the run is finished and gets no further rounds, its result is reported and nothing is
    changed. A run that is extended ends as if it had had all its rounds from the beginning if
    nothing in it depends on their number: the schedules of learning rate and drop rates are
    constant, there is no warm-up, and its last round was one to evaluate. Otherwise, the learning
    rate rises again to where the schedule of all rounds is by then.

    Args:
        out: folder of the run.
        listener: is told about the progress of the run.
        connect: opens the transport; by default the one that the configuration names.
        rounds: new number of rounds of the whole run; ``None`` leaves it.

    Raises:
        DroppeftError: the folder holds no run, another process works in it, ``rounds`` is not more
            than the run has, or data, split or model are not those with which the run was started.
        Interrupted: on Ctrl-C.
    """
    out = out.resolve()
    if not (out / CONFIG).is_file():
        raise DroppeftError(f"{out}: holds no run to resume (no {CONFIG})")
    if (out / RESULT).exists() and rounds is None:
        result = read_result(out)
        listener.finished(result)
        return result
    with locked(out):
        config = load_config(out / CONFIG)
        if rounds is not None:
            config = with_more_rounds(config, rounds, out)
        check_settings(config)
        memory_type = method_named(config.method).memory_type
        newest = checkpoints.load_newest(out / "checkpoints", memory_type)
        config = resolve(config, cuda=torch.cuda.is_available())
        prepared = prepare(config, listener.preparing, newest.facts["run"])
        _check_same_inputs(prepared, newest, out)
        if config.start_from is not None:
            first = checkpoints.load_round(out / "checkpoints", 0, memory_type)
            prepared = replace(prepared, state=first.state)
        rows = [RoundRow.from_columns(row) for row in rewind(out / ROUNDS, newest.round)]
        if len(rows) != newest.round:
            raise DroppeftError(
                f"{out / ROUNDS} has {len(rows)} of the {newest.round} rounds that are saved; "
                "put the file back, or start a new run"
            )
        rewind(out / CLIENTS, newest.round)
        if rounds is not None:
            save_extended(out, config)
        with _connect(prepared, connect, listener) as transport:
            return _run_rounds(prepared, transport, newest, rows, out, listener)


def _started(prepared: Prepared) -> Prepared:
    """Return the server with the values that ``start_from`` names, if it names any."""
    folder, setup = prepared.config.start_from, prepared.setup
    if folder is None:
        return prepared
    state = with_start_values(folder, prepared.loaded, prepared.method, setup, prepared.state)
    return replace(prepared, state=state)


def _connect(
    prepared: Prepared, connect: Connect | None, listener: Listener
) -> AbstractContextManager[Transport]:
    """Open the transport, with ``connect`` if it is given."""
    check_tracker(prepared.config.tracker)
    listener.preparing("reaching the clients")
    return (connect or transport_named(prepared.config.transport))(prepared.loaded)


def _run_rounds(
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
            about = _describe(prepared, last.facts)
            listener.started({**about, "expected_wall_s": expected_wall_s}, list(rows))
            for _ in range(last.round, prepared.config.rounds):
                checkpoint, row, client_rows = _run_one_round(
                    prepared, transport, last, saving_wall_s, listener
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
    if any(row.accepted for row in recent) or len(recent) < min(MAX_LOST_ROUNDS, rounds):
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
) -> tuple[Checkpoint, RoundRow, list[dict[str, Any]]]:
    """Run and evaluate one round; return its checkpoint, its row and its clients' rows.

    Args:
        last: the checkpoint of the round before.
        saving_wall_s: seconds that saving the round before took.
    """
    start = time.perf_counter()
    round = last.round + 1
    state, closed = run_round(
        prepared.setup, prepared.method, transport, last.state, round, listener.replied
    )
    evaluation = _evaluate_round(prepared, transport, state, round)
    row = round_row(
        closed,
        evaluation,
        saving_wall_s,
        time.perf_counter() - start + saving_wall_s,
        prepared.method.note(prepared.setup, state),
    )
    client_rows = [
        client_row(*parts)
        for parts in zip(
            closed.instructions,
            closed.checked_replies,
            closed.replies,
            closed.modelled.clients,
            strict=True,
        )
    ]
    return Checkpoint(round, state, last.facts), row, client_rows


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
    checkpoints.save(out / "checkpoints", checkpoint, {0, best.round if best else 0})
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
    evaluation = _evaluate(prepared, state.model, prepared.sample)
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
    config = prepared.config
    delivered = _delivered(prepared, last, rows, out)
    final = _final_global_model(prepared, delivered, out, listener)
    final |= _generated(prepared, delivered.state.model, out, listener)
    if config.evaluation.personalised:
        have_own = _clients_have_state(prepared, last)
        own = last if have_own else delivered
        final |= _final_client_models(prepared, transport, own, last.round + 1, out, listener)
        final |= {"clients_have_own_models": have_own}
    else:
        final |= summarise_clients(ClientEvaluation((), (), wall_s=0.0), {}, _primary(prepared))
        final |= {"personalised_round": None, "clients_have_own_models": None}
    result = {
        "schema_version": SCHEMA_VERSION,
        **_describe(prepared, last.facts),
        **summarise(rows, last.facts["initial"], _primary(prepared), config.target),
        "delivered_round": delivered.round,
        **final,
        "prepare_wall_s": prepared.prepare_wall_s,
        "versions": versions(),
        "machine": machine(config.accelerator),
    }
    trend = trend_of(result, rows)
    result |= {"conclusion": conclude(result, rows), "trend": trend.kind if trend else None}
    write_atomically(out / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    shutil.rmtree(state_folder(prepared.setup.run), ignore_errors=True)
    listener.finished(result)
    return result


def _delivered(prepared: Prepared, last: Checkpoint, rows: list[RoundRow], out: Path) -> Checkpoint:
    """Return the checkpoint of the round whose global model is delivered."""
    round = delivered_round(rows)
    if round == last.round:
        return last
    return checkpoints.load_round(out / "checkpoints", round, prepared.method.memory_type)


def _clients_have_state(prepared: Prepared, last: Checkpoint) -> bool:
    """Whether the own model of a client has tensors that only the client has saved.

    Clients keep these of their last participation alone, so that their own models are those after
    the last round.
    """
    evaluate_client = prepared.method.evaluate_client
    return any(
        evaluate_client(prepared.setup, last.state, last.round + 1, client).state_round is not None
        for client in range(prepared.config.clients)
    )


def _final_global_model(
    prepared: Prepared, delivered: Checkpoint, out: Path, listener: Listener
) -> dict[str, Any]:
    """Evaluate the global model on all test rows and write its adapter.

    The values are ``None`` for a method without a global model. No adapter is written for a model
    with a base delta, because the adapter alone would not be the model: ``droppeft export --merge``
    writes it with its backbone.
    """
    metrics, model = prepared.loaded.task.metrics, delivered.state.model
    if not prepared.method.has_global_model(prepared.config):
        return {**quality_of("global", metrics, None), "adapter_sha256": None, "test_rows": 0}
    rows = evaluation_sample(len(prepared.test), final_rows(prepared))
    listener.preparing(f"measuring on {counted(len(rows), 'test row')}")
    evaluation = _evaluate(prepared, model, rows)
    return {
        **quality_of("global", metrics, evaluation.metrics),
        "adapter_sha256": None
        if model.base_delta
        else write_adapter(prepared.loaded, model, delivered.round, evaluation, out),
        "test_rows": evaluation.rows,
    }


def _generated(
    prepared: Prepared, model: GlobalModel, out: Path, listener: Listener
) -> dict[str, Any]:
    """Let the model write texts, if the run is to end with some."""
    if not writes_texts(prepared.method, prepared.config):
        return {}
    listener.preparing("letting the model before and after training write texts")
    result, samples = written_before_and_after(
        prepared, model, lambda one: _attached(prepared, one)
    )
    if samples:
        write_atomically(out / GENERATED, as_lines(samples))
    return result


def _final_client_models(
    prepared: Prepared,
    transport: Transport,
    saved: Checkpoint,
    round: int,
    out: Path,
    listener: Listener,
) -> dict[str, Any]:
    """Evaluate every client's model on its own test rows.

    Args:
        saved: the checkpoint that has the models.
        round: the one that would come next.
    """
    asked = prepared.config.evaluation.personalised_generated
    writing = ", and letting it write texts" if asked else ""
    listener.preparing(f"measuring each client's model on its own test rows{writing}")
    setup, method = prepared.setup, prepared.method
    participations = Counter(row["client"] for row in read_rows(out / CLIENTS) if row["accepted"])
    evaluation = evaluate_clients(setup, method, transport, saved.state, round)
    if not evaluation.measurements:
        example = evaluation.failures[0]
        raise DroppeftError(
            f"no client could be measured (client {example.client}: {example.reason}); correct "
            f"this, then resume {out}"
        )
    summary = summarise_clients(evaluation, participations, _primary(prepared))
    return {**summary, "personalised_round": saved.round}


def _primary(prepared: Prepared) -> Metric:
    return prepared.loaded.task.metrics[0]


def _initial_facts(prepared: Prepared, evaluation: Evaluation) -> dict[str, Any]:
    """What is measured once, before round 1, and stored in every checkpoint."""
    return {
        "initial": dict(evaluation.metrics),
        "label_names": list(prepared.loaded.data.label_names),
        "sampled_test_rows": evaluation.rows,
        "run": prepared.setup.run,
        **identity(prepared.loaded),
        "references": references(prepared.loaded),
    }


def _describe(prepared: Prepared, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a run, for listeners and for the result file."""
    config, data = prepared.config, prepared.loaded.data
    return {
        "task": config.task,
        "metric": _primary(prepared).name,
        "method": config.method,
        "method_summary": prepared.method.summary,
        "run": prepared.setup.run,
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "clients": config.clients,
        "cohort_size": config.cohort_size,
        "drawn_size": config.drawn,
        "profiles": list(config.clock.profiles),
        "no_clock_reason": prepared.no_clock_reason,
        "planned_rounds": config.rounds,
        "num_layers": prepared.setup.num_layers,
        "parameters": prepared.loaded.backbone.parameters,
        "trainable_parameters": _count_trainable(prepared),
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        "classes": len(data.label_names),
        "data_hash": data.content_hash,
        "data_findings": prepared.findings.as_tree(),
        **quality_of("initial", prepared.loaded.task.metrics, facts["initial"]),
        **facts["references"],
        "sampled_test_rows": len(prepared.sample),
        "config": as_tree(config),
    }


def _count_trainable(prepared: Prepared) -> int:
    """Count the values that clients train, including the head.

    A method may leave a part of an adapter untrained.
    """
    trained = prepared.method.evaluate_client(prepared.setup, prepared.state, 1, 0).train
    parameters = prepared.model.parameters
    if trained is None:
        return count_parameters(parameters)
    named = ((name, value) for values in parameters.values() for name, value in values.items())
    return sum(value.numel() for name, value in named if name in trained)


def _evaluate(prepared: Prepared, model: GlobalModel, rows: Rows) -> Evaluation:
    """Evaluate a global model on the given test rows."""
    config = prepared.config
    with _attached(prepared, model) as attached:
        return evaluate(
            attached,
            prepared.test,
            rows,
            prepared.model.task,
            config.evaluation.batch_size,
            config.training.precision,
        )


@contextmanager
def _attached(prepared: Prepared, model: GlobalModel) -> Iterator[nn.Module]:
    """Attach a global model to the backbone and yield the whole."""
    client_model = prepared.model
    client_model.attach(model.adapter)
    set_tensors(client_model.parameters, model.tensors)
    client_model.load_layers()
    with base_delta_applied(client_model.model, model.base_delta):
        yield client_model.model


def _check_same_inputs(prepared: Prepared, checkpoint: Checkpoint, out: Path) -> None:
    """Refuse to resume a run with other data, another split or another backbone."""
    now = identity(prepared.loaded)
    changed = difference({name: checkpoint.facts[name] for name in now}, now)
    if changed:
        raise DroppeftError(f"{out}: cannot be resumed: {changed}; restore it, or start a new run")
