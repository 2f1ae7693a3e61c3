"""Continue a run from its newest checkpoint. Ours."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from droppeft.client.run_inputs import difference, identity
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.methods import method_named
from droppeft.methods.rules import check_settings
from droppeft.models.hardware import resolve_here
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.folder import (
    CLIENTS,
    CONFIG,
    RESULT,
    ROUNDS,
    SETTINGS,
    bound_settings,
    check_holds_run,
    check_same_settings,
    locked,
    read_result,
    remove_temporary_files,
    save_extended,
    with_more_rounds,
)
from droppeft.runs.listener import Listener
from droppeft.runs.read_ledger import read_ledger, read_rounds
from droppeft.server.description import calibration_of
from droppeft.server.finite_models import last_finite
from droppeft.server.prepare import Prepared, prepare
from droppeft.server.privacy_accountant import check_budget, with_noise_multiplier
from droppeft.server.privacy_releases import count_lost_releases, releases
from droppeft.server.run import reach_clients, run_rounds
from droppeft.transports.base import Connect


def resume_run(
    out: Path, listener: Listener, connect: Connect | None = None, rounds: int | None = None
) -> dict[str, Any]:
    """Continue a run from its newest checkpoint and return the content of its ``result.json``.

    If the model of that checkpoint, or its loss, is not finite, the run returns to the last round
    that was evaluated and finite.

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
            than the run has, a file of the run is damaged, or settings, data, split or model are
            not those with which the run was started.
        Interrupted: on Ctrl-C.
    """
    out = out.resolve()
    check_holds_run(out)
    if (out / RESULT).exists() and rounds is None:
        result = read_result(out)
        listener.finished(result)
        return result
    with locked(out):
        config = load_config(out / CONFIG)
        if rounds is not None:
            config = with_noise_multiplier(with_more_rounds(config, rounds, out))
        memory_type = method_named(config.method).memory_type
        remove_temporary_files(out)
        newest = checkpoints.load_newest(
            out / "checkpoints", memory_type, partial(check_same_settings, out, config)
        )
        check_settings(config)
        config = resolve_here(config)
        measured = calibration_of(newest.facts)
        prepared = prepare(config, listener.preparing, newest.facts["run"], calibration=measured)
        _check_same_inputs(prepared, newest, out)
        if config.start_from is not None:
            first = checkpoints.load_round(out / "checkpoints", 0, memory_type)
            prepared = replace(prepared, state=first.state)
        if (out / RESULT).exists() and newest.round < read_result(out)["rounds"]:
            raise DroppeftError(
                f"{out / 'checkpoints'}: the checkpoint of the last round is missing or damaged, "
                f"so that the run cannot go on from there; begin a new run with: start_from={out}"
            )
        known = read_rounds(out / ROUNDS)[: newest.round]
        newest = last_finite(prepared, newest, known, out, listener.preparing)
        if config.privacy.is_on:
            newest = count_lost_releases(out, newest)
            if rounds is not None:
                check_budget(config, releases(newest.facts, rounds))
        if newest.round < len(known):
            checkpoints.remove_after(out / "checkpoints", newest.round)
        rows = read_ledger(out / ROUNDS, out / CLIENTS, newest.round)
        if rounds is not None:
            newest = replace(newest, facts={**newest.facts, SETTINGS: bound_settings(config)})
            save_extended(out, config)
        with reach_clients(prepared, connect, listener) as (prepared, transport):
            return run_rounds(prepared, transport, newest, rows, out, listener)


def _check_same_inputs(prepared: Prepared, checkpoint: Checkpoint, out: Path) -> None:
    """Refuse to resume a run with other data, another split or another backbone."""
    now = identity(prepared.loaded)
    changed = difference({name: checkpoint.facts[name] for name in now}, now)
    if changed:
        raise DroppeftError(f"{out}: cannot be resumed: {changed}; restore it, or start a new run")
