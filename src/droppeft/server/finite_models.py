"""Find the last round of a run whose model is finite, for a run that must return to it. Ours."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from droppeft.client.run_inputs import Say
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import flatten
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.ledger import RoundRow
from droppeft.server.global_evaluation import evaluate_global
from droppeft.server.prepare import Prepared


def is_finite(state: ServerState) -> bool:
    """Whether all values of the state's models are finite."""
    models = (state.model, *state.alternatives.values())
    return all(
        np.isfinite(array).all()
        for model in models
        for array in (
            *(array for _, _, array in flatten(model.tensors)),
            *(model.base_delta.tensors.values() if model.base_delta else ()),
        )
    )


def evaluated_round(rows: Sequence[RoundRow]) -> int:
    """Return the last round whose model was evaluated, and had a finite loss; 0 if there is none.

    The model before round 1 was evaluated, too.
    """
    evaluated = (
        row.round
        for row in rows
        if not row.diverged and any(value is not None for value in row.quality.values())
    )
    return max(evaluated, default=0)


def evaluated_state(
    prepared: Prepared, last: Checkpoint, rows: Sequence[RoundRow], out: Path
) -> ServerState:
    """Return the state of the round that :func:`evaluated_round` names.

    Args:
        prepared: the server.
        last: the newest checkpoint.
        rows: up to its round.
        out: folder of the run.
    """
    if not rows or rows[-1].diverged or last.round == evaluated_round(rows):
        return last.state  # after a round that diverged, it is that of an earlier round
    return _checkpoint(prepared, evaluated_round(rows), out).state


def last_finite(
    prepared: Prepared, newest: Checkpoint, rows: Sequence[RoundRow], out: Path, say: Say
) -> Checkpoint:
    """Return the newest checkpoint, or that of the last evaluated round if it is not finite.

    Args:
        prepared: the server.
        newest: the newest checkpoint.
        rows: up to its round; if some are missing, the newest checkpoint is returned.
        out: folder of the run.
        say: called with the round to which the run returns.
    """
    evaluated = evaluated_round(rows)
    if len(rows) < newest.round:
        return newest
    known = newest.round == evaluated or rows[-1].diverged
    if is_finite(newest.state) and (known or _has_finite_loss(prepared, newest)):
        return newest
    say(f"the model of round {newest.round} is not finite; returning to round {evaluated}")
    return replace(_checkpoint(prepared, evaluated, out), facts=newest.facts)


def _has_finite_loss(prepared: Prepared, checkpoint: Checkpoint) -> bool:
    """Whether the loss of the global model, if there is one, is finite."""
    if not prepared.method.has_global_model(prepared.config):
        return True
    model = checkpoint.state.model
    return math.isfinite(evaluate_global(prepared, model, prepared.sample).loss)


def _checkpoint(prepared: Prepared, round: int, out: Path) -> Checkpoint:
    return checkpoints.load_round(out / "checkpoints", round, prepared.method.memory_type)
