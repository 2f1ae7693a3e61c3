"""A whole run in a folder: start it, go on with it, and leave what it found.

Whatever the moment of a crash, the folder holds a configuration, whole checkpoints and whole rows;
what follows from (configuration, checkpoint) is the same as if nothing had happened.
"""

import json
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.adapters.by_layer import count_parameters, set_tensors
from droppeft.cached_layers.cached_layers import state_folder
from droppeft.client.client_state import state_dir
from droppeft.client.run_inputs import difference, identity
from droppeft.config import Config, as_tree, load_config, resolve
from droppeft.data.builtin import EXPECTED_HASH
from droppeft.data.texts import Rows
from droppeft.errors import DroppeftError
from droppeft.files import write_atomically
from droppeft.messages import GlobalModel
from droppeft.methods import method_named
from droppeft.methods.rules import check_settings
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.environment import machine, versions
from droppeft.runs.folder import CLIENTS, CONFIG, RESULT, ROUNDS, begin, check_free, held
from droppeft.runs.ledger import (
    SCHEMA_VERSION,
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
from droppeft.server.client_evaluation import measure_clients, personalised_sums
from droppeft.server.prepare import Prepared, prepare, references
from droppeft.server.rounds import run_round
from droppeft.training.loop import Evaluation, evaluate
from droppeft.transports.base import Connect, Transport
from droppeft.transports.registry import transport_named

LOST_ROUNDS = 3
"""So many rounds in a row without a merged reply end a run."""


class Interrupted(Exception):
    """The user stopped the run; ``round`` is the last one that is saved, in ``folder``."""

    def __init__(self, folder: Path, round: int) -> None:
        super().__init__(folder, round)
        self.folder = folder
        self.round = round


def start_run(
    config: Config, out: Path, listener: Listener, connect: Connect | None = None
) -> dict[str, Any]:
    """Run a configuration in a new folder and return the content of its ``result.json``.

    Args:
        connect: opens the transport; by default the one that the configuration names.

    Raises:
        DroppeftError: something the configuration names does not work, or the folder is taken;
            nothing has been written then.
        Interrupted: on Ctrl-C after the folder was made.
    """
    check_settings(config)
    check_free(out)
    state_dir()  # said now, and not when a client wants to keep something
    out = out.resolve()
    config = method_named(config.method).adjust(resolve(config, cuda=torch.cuda.is_available()))
    prepared = prepare(config, listener.preparing, secrets.token_hex(8))
    with _open(prepared, connect, listener) as transport:
        listener.preparing("measuring the references")
        first = Checkpoint(0, prepared.state, _facts(prepared))
        begin(out, prepared.config, first)
        with held(out):
            return _play(prepared, transport, first, [], out, listener)


def resume_run(out: Path, listener: Listener, connect: Connect | None = None) -> dict[str, Any]:
    """Go on where a run stopped; a finished one is only reported.

    Raises:
        DroppeftError: the folder holds no run, or another process works in it.
        Interrupted: on Ctrl-C.
    """
    out = out.resolve()
    if not (out / CONFIG).is_file():
        raise DroppeftError(f"{out}: holds no run to resume (no {CONFIG})")
    with held(out):
        if (out / RESULT).exists():
            result: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
            listener.finished(result)
            return result
        config = load_config(out / CONFIG)
        check_settings(config)
        memory_type = method_named(config.method).memory_type
        newest = checkpoints.load_newest(out / "checkpoints", memory_type)
        config, run = resolve(config, cuda=torch.cuda.is_available()), newest.facts.get("run", "")
        prepared = prepare(config, listener.preparing, run)
        _check_same_start(prepared, newest, out)
        rows = [RoundRow(**row) for row in rewind(out / ROUNDS, newest.round)]
        if len(rows) != newest.round:
            raise DroppeftError(
                f"{out / ROUNDS} has {len(rows)} of the {newest.round} rounds that are saved; "
                "put the file back, or start a new run"
            )
        rewind(out / CLIENTS, newest.round)
        with _open(prepared, connect, listener) as transport:
            return _play(prepared, transport, newest, rows, out, listener)


def _open(
    prepared: Prepared, connect: Connect | None, listener: Listener
) -> AbstractContextManager[Transport]:
    check_tracker(prepared.config.tracker)
    listener.preparing("reaching the clients")
    return (connect or transport_named(prepared.config.transport))(prepared.loaded)


def _play(
    prepared: Prepared,
    transport: Transport,
    last: Checkpoint,
    rows: list[RoundRow],
    out: Path,
    listener: Listener,
) -> dict[str, Any]:
    saving_wall_s = 0.0
    with tracked(listener, prepared.config, out) as told:
        try:
            told.started(_about(prepared, last.facts), list(rows))
            for _ in range(last.round, prepared.config.rounds):
                now, row, clients = _one_round(prepared, transport, last, saving_wall_s, told)
                saving_wall_s = _save(out, now, row, clients)
                last = now
                rows.append(row)
                told.round_done(row)
                _check_not_lost(rows, prepared.config.rounds, out)
            # Of a run whose last process stopped so.
            _check_not_lost(rows, prepared.config.rounds, out)
            return _finish(prepared, transport, last, rows, out, told)
        except KeyboardInterrupt:
            raise Interrupted(out, last.round) from None


def _check_not_lost(rows: list[RoundRow], rounds: int, out: Path) -> None:
    """Stop where going on would only use up rounds, and where nothing at all was learnt."""
    over = len(rows) == rounds
    recent = rows if over else rows[-LOST_ROUNDS:]
    if any(row.accepted for row in recent) or len(recent) < min(LOST_ROUNDS, rounds):
        return
    then = "start a new run" if over else f"resume {out}"
    raise DroppeftError(
        f"no reply could be merged in {len(recent)} rounds in a row "
        f"({_why_nobody(recent[-1])}); mend that, then {then}"
    )


def _why_nobody(row: RoundRow) -> str:
    """Why nothing of a round was merged, by an example."""
    if row.failures:
        last = row.failures[-1]
        return f"client {last['client']}: {last['reason']}"
    if row.late:
        return f"modelled turns are longer than clock.deadline_s, as that of client {row.late[-1]}"
    return "by the availability of their profiles no client was there"


def _one_round(
    prepared: Prepared,
    transport: Transport,
    last: Checkpoint,
    saving_wall_s: float,
    listener: Listener,
) -> tuple[Checkpoint, RoundRow, list[dict[str, Any]]]:
    """Play and measure one round; return what is to be saved of it."""
    start = time.perf_counter()
    round = last.round + 1
    state, closed = run_round(
        prepared.setup, prepared.method, transport, last.state, round, listener.replied
    )
    quality = _quality(prepared, state.model, round)
    row = round_row(
        closed,
        quality,
        saving_wall_s,
        time.perf_counter() - start + saving_wall_s,
        prepared.method.note(prepared.setup, state),
    )
    turns = closed.modelled.clients
    parts = zip(closed.instructions, closed.answers, closed.replies, turns, strict=True)
    clients = [client_row(*each) for each in parts]
    return Checkpoint(round, state, last.facts), row, clients


def _save(out: Path, now: Checkpoint, row: RoundRow, clients: list[dict[str, Any]]) -> float:
    """Rows first, since the checkpoint is what counts; returns the seconds it took."""
    start = time.perf_counter()
    append_rows(out / CLIENTS, clients)
    append_rows(out / ROUNDS, [asdict(row)])
    checkpoints.save(out / "checkpoints", now)
    return time.perf_counter() - start


def _quality(prepared: Prepared, model: GlobalModel, round: int) -> dict[str, float | None]:
    config = prepared.config
    due = round % config.evaluation.every == 0 or round == config.rounds
    if not (due and prepared.method.has_global_model(config)):
        return dict.fromkeys(("loss", "accuracy", "f1", "wall_s"))
    measured = _evaluate(prepared, model, prepared.sample)
    return {key: asdict(measured)[key] for key in ("loss", "accuracy", "f1", "wall_s")}


def _finish(
    prepared: Prepared,
    transport: Transport,
    last: Checkpoint,
    rows: list[RoundRow],
    out: Path,
    listener: Listener,
) -> dict[str, Any]:
    config = prepared.config
    measured = _global_result(prepared, last.state.model, out, listener)
    if config.evaluation.personalised:
        measured |= _personalised_result(prepared, transport, last, out, listener)
    result = {
        "schema_version": SCHEMA_VERSION,
        **_about(prepared, last.facts),
        **summarise(rows, last.facts["initial_accuracy"], config.target_accuracy),
        **measured,
        "prepare_wall_s": prepared.prepare_wall_s,
        "versions": versions(),
        "machine": machine(config.accelerator),
    }
    write_atomically(out / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    shutil.rmtree(state_folder(prepared.setup.run), ignore_errors=True)
    listener.finished(result)
    return result


def _global_result(
    prepared: Prepared, model: GlobalModel, out: Path, listener: Listener
) -> dict[str, Any]:
    """What the global model is worth, and its adapter as files; nothing where there is none.

    An adapter cannot say what is added to the backbone: of such a model there are no files until
    ``droppeft export --merge`` makes them.
    """
    names = ("global_accuracy", "global_f1", "global_loss", "adapter_sha256")
    if not prepared.method.has_global_model(prepared.config):
        return {**dict.fromkeys(names), "test_rows": 0}
    listener.preparing("measuring on the whole test set")
    whole = _evaluate(prepared, model, np.arange(len(prepared.test), dtype=np.int64))
    return {
        "global_accuracy": whole.accuracy,
        "global_f1": whole.f1,
        "global_loss": whole.loss,
        "adapter_sha256": None
        if model.base_delta
        else write_adapter(prepared.loaded, model, asdict(whole), out),
        "test_rows": whole.rows,
    }


def _personalised_result(
    prepared: Prepared, transport: Transport, last: Checkpoint, out: Path, listener: Listener
) -> dict[str, Any]:
    listener.preparing("measuring each client's model on its own test rows")
    setup, method = prepared.setup, prepared.method
    turns = Counter(row["client"] for row in read_rows(out / CLIENTS) if row["accepted"])
    found = measure_clients(setup, method, transport, last.state, last.round + 1, turns)
    if not found.measurements:
        example = found.failures[0]
        raise DroppeftError(
            f"no client could be measured (client {example.client}: {example.reason}); mend that, "
            f"then resume {out}"
        )
    return personalised_sums(found, turns)


def _facts(prepared: Prepared) -> dict[str, Any]:
    """What is measured once, before round 1, and kept with every checkpoint."""
    start = _evaluate(prepared, prepared.state.model, prepared.sample)
    return {
        "initial_accuracy": start.accuracy,
        "initial_loss": start.loss,
        "label_names": list(prepared.loaded.data.label_names),
        "sampled_test_rows": start.rows,
        "run": prepared.setup.run,
        **identity(prepared.loaded),
        **references(prepared.loaded),
    }


def _about(prepared: Prepared, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a run, for people and for the result file."""
    config, data = prepared.config, prepared.loaded.data
    cut = (config.source.max_train_rows, config.source.max_test_rows) != (None, None)
    return {
        "method": config.method,
        "run": prepared.setup.run,
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "clients": config.clients,
        "cohort_size": config.cohort_size,
        "drawn_size": config.drawn,
        "profiles": list(config.clock.profiles),
        "without_clock": prepared.without_clock,
        "planned_rounds": config.rounds,
        "num_layers": prepared.setup.num_layers,
        "trainable_parameters": _trainable(prepared),
        "train_rows": len(data.train),
        "classes": len(data.label_names),
        "data_hash": data.content_hash,
        "builtin_data_as_published": data.content_hash == EXPECTED_HASH
        if config.data == "builtin" and not cut
        else None,
        "initial_loss": facts["initial_loss"],
        "majority_accuracy": facts["majority_accuracy"],
        "own_majority_accuracy": facts.get("own_majority_accuracy"),
        "tfidf_accuracy": facts["tfidf_accuracy"],
        "sampled_test_rows": len(prepared.sample),
        "config": as_tree(config),
    }


def _trainable(prepared: Prepared) -> int:
    """Values that clients train, the head included; a method may leave a part of an adapter out."""
    names = prepared.method.evaluate_client(prepared.setup, prepared.state, 1, 0).train
    parameters = prepared.model.parameters
    if names is None:
        return count_parameters(parameters)
    named = ((name, value) for values in parameters.values() for name, value in values.items())
    return sum(value.numel() for name, value in named if name in names)


def _evaluate(prepared: Prepared, model: GlobalModel, rows: Rows) -> Evaluation:
    on, config = prepared.model, prepared.config
    on.attach(model.adapter)
    set_tensors(on.parameters, model.tensors)
    on.load_layers()
    with base_delta_applied(on.model, model.base_delta):
        return evaluate(
            on.model,
            prepared.test,
            rows,
            on.task,
            config.evaluation.batch_size,
            config.training.precision,
        )


def _check_same_start(prepared: Prepared, checkpoint: Checkpoint, out: Path) -> None:
    """Refuse to go on with other texts, another split or another backbone."""
    now = identity(prepared.loaded)
    wrong = difference({name: checkpoint.facts[name] for name in now}, now)
    if wrong:
        raise DroppeftError(
            f"{out}: this run began otherwise: {wrong}; put it back, or start a new run"
        )
