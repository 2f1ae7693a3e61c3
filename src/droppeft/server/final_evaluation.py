"""Evaluate the models at the end of a run: the delivered global model, and those of the clients."""

from collections import Counter
from pathlib import Path
from typing import Any

from droppeft.errors import DroppeftError
from droppeft.files import as_json_lines, write_atomically
from droppeft.messages.server_state import GlobalModel
from droppeft.quantities import counted
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.folder import CLIENTS, GENERATED
from droppeft.runs.ledger import RoundRow
from droppeft.runs.listener import Listener
from droppeft.runs.model_files import write_adapter
from droppeft.runs.read_ledger import read_rows
from droppeft.server.client_evaluation import ClientEvaluation, evaluate_clients, summarise_clients
from droppeft.server.delivered_round import delivered_round
from droppeft.server.expected_time import final_rows
from droppeft.server.generated_texts import written_before_and_after
from droppeft.server.global_evaluation import evaluate_global
from droppeft.server.predicted_classes import predicted_classes
from droppeft.server.prepare import Prepared, evaluation_sample, writes_texts
from droppeft.tasks.metrics import quality
from droppeft.transports.base import Transport


def evaluate_final_models(
    prepared: Prepared,
    transport: Transport,
    last: Checkpoint,
    rows: list[RoundRow],
    out: Path,
    listener: Listener,
) -> dict[str, Any]:
    """Evaluate the delivered model and the clients' own models, and write the adapter.

    Args:
        prepared: the server; its state is the one before round 1.
        last: the checkpoint of the last round.
        rows: of all rounds.
        out: folder of the run, where the adapter, generated texts and mistakes are written.

    Returns:
        What ``result.json`` says about these models.

    Raises:
        DroppeftError: no client could be measured.
    """
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
        final |= summarise_clients(ClientEvaluation((), (), wall_s=0.0), {}, prepared.metric)
        final |= {"personalised_round": None, "clients_have_own_models": None}
    return {"delivered_round": delivered.round, **final}


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
        return {**quality("global", metrics, None), "adapter_sha256": None, "test_rows": 0}
    rows = evaluation_sample(len(prepared.test), final_rows(prepared))
    listener.preparing(f"measuring on {counted(len(rows), 'test row')}")
    evaluation = evaluate_global(prepared, model, rows)
    return {
        **quality("global", metrics, evaluation.metrics),
        **predicted_classes(prepared, evaluation, out),
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
    result, samples = written_before_and_after(prepared, model)
    if samples:
        write_atomically(out / GENERATED, as_json_lines(samples))
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

    Clients that never measure do not keep a run with a global model from its end.

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
    is_known = all(failure.for_good for failure in evaluation.failures)
    if not evaluation.measurements and not (is_known and method.has_global_model(prepared.config)):
        example = evaluation.failures[0]
        raise DroppeftError(
            f"no client could be measured (client {example.client}: {example.reason}); correct "
            f"this, then resume {out}"
        )
    summary = summarise_clients(evaluation, participations, prepared.metric)
    return {**summary, "personalised_round": saved.round}
