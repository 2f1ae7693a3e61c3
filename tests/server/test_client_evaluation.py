"""Client state, and the evaluation of every client's model on its own test rows."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from droppeft.adapters.by_layer import set_tensors
from droppeft.client.client_state import client_folder, load_tensors
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.federated_method import evaluation_only
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import EvaluationReply, Failure, Update
from droppeft.messages.tensors import flatten, layer_key
from droppeft.report.screen import quality_line
from droppeft.runs.export import export_run
from droppeft.server.client_evaluation import ClientEvaluation, evaluate_clients, summarise_clients
from droppeft.server.prepare import Prepared
from droppeft.server.resume import resume_run
from droppeft.server.run import Interrupted, start_run
from droppeft.tasks.metrics import ACCURACY, LOSS
from droppeft.training.loop import evaluate
from droppeft.transports.base import Arrival
from droppeft.transports.in_process import InProcess
from handmade import Scripted, update_for
from runs import Clients, Recorder, interfering, outcome, rows_of, update_of

pytestmark = pytest.mark.usefixtures("state")

RUN = "00c0ffee"
PERSONAL_LAYER = 1


@pytest.fixture
def first(prepared: Prepared) -> Instruction:
    """Client 1's first instruction: one layer is personal, all others are shared."""
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [1])
    personal = {name for key, name, _ in flatten(instruction.tensors) if key == PERSONAL_LAYER}
    return replace(instruction, share=instruction.share - personal, run=RUN, dropout=None)


def next_instruction(instruction: Instruction, round: int, saved: int | None) -> Instruction:
    """The client's next instruction, without the tensors of its personal layer."""
    sent = {key: named for key, named in instruction.tensors.items() if key != PERSONAL_LAYER}
    return replace(instruction, round=round, tensors=sent, state_round=saved)


def ask(clients: Clients, instruction: Instruction) -> Any:
    return clients[instruction.client].run(instruction)


def layers_of(reply: Update) -> set[Any]:
    return set(reply.tensors)


def test_a_personal_layer_is_saved_and_not_sent(clients: Clients, first: Instruction) -> None:
    reply = update_of(clients, first)
    assert PERSONAL_LAYER not in reply.tensors
    assert layers_of(reply) == set(first.tensors) - {PERSONAL_LAYER}
    saved = load_tensors(client_folder(RUN, 1), 1)
    assert set(saved) == {PERSONAL_LAYER}
    for name, array in saved[PERSONAL_LAYER].items():
        assert not np.array_equal(array, first.tensors[PERSONAL_LAYER][name])


def test_a_training_starts_with_the_saved_tensors(clients: Clients, first: Instruction) -> None:
    """The result is the same as if the server had sent them."""
    update_of(clients, first)
    saved = load_tensors(client_folder(RUN, 1), 1)
    later = next_instruction(first, round=2, saved=1)
    update = update_of(clients, later)
    complete = replace(later, tensors={**later.tensors, **saved}, state_round=None)
    expected = update_of(clients, complete)
    assert update.train_loss == expected.train_loss
    for key, name, array in flatten(update.tensors):
        np.testing.assert_array_equal(array, expected.tensors[key][name])
    fresh = update_of(clients, replace(first, round=2))
    assert fresh.train_loss != update.train_loss


def test_tensors_of_the_instruction_replace_saved_ones(
    clients: Clients, first: Instruction
) -> None:
    """A layer that becomes shared takes the global value."""
    update_of(clients, first)
    whole = replace(first, round=2, share=first.share)
    assert (
        update_of(clients, replace(whole, state_round=1)).train_loss
        == update_of(clients, whole).train_loss
    )


def test_a_training_whose_reply_was_lost_does_not_count(
    clients: Clients, first: Instruction
) -> None:
    update_of(clients, first)
    expected = update_of(clients, next_instruction(first, round=3, saved=1))
    update_of(clients, next_instruction(first, round=2, saved=1))  # its reply is lost
    assert (
        update_of(clients, next_instruction(first, round=3, saved=1)).train_loss
        == expected.train_loss
    )


def test_a_client_that_lost_its_state_reports_it(clients: Clients, first: Instruction) -> None:
    update_of(clients, first)
    (client_folder(RUN, 1) / "round-000001.safetensors").write_bytes(b"")
    instruction = next_instruction(first, round=2, saved=1)
    [arrival] = InProcess(clients).exchange([instruction])
    said = "the state that it saved in round 1 is missing or damaged"
    assert arrival.reply == Failure(1, said, lost=True)


def test_an_instruction_without_needed_tensors_is_an_error(
    clients: Clients, first: Instruction
) -> None:
    with pytest.raises(DroppeftError, match="and this client has not saved it"):
        ask(clients, next_instruction(first, round=2, saved=None))


def test_a_client_that_shares_all_saves_nothing(
    clients: Clients, first: Instruction, state: Path
) -> None:
    names = frozenset(name for _, name, _ in flatten(first.tensors))
    update_of(clients, replace(first, share=names, run=""))
    assert not state.exists()


# Measuring


def test_a_measurement_is_of_the_model_on_the_client_s_own_test_rows(
    clients: Clients, first: Instruction, state: Path
) -> None:
    reply = ask(clients, evaluation_only(first))
    rows = clients[1].rows.test
    set_tensors(clients[0].model.parameters, first.tensors)
    expected = evaluate(
        clients[0].model.model, clients[0].table, rows, clients[0].model.task, 64, "fp32"
    )
    assert reply == EvaluationReply(1, 1, first.nonce, len(rows), expected.metrics)
    assert not state.exists()


def test_a_measurement_uses_the_saved_tensors(clients: Clients, first: Instruction) -> None:
    update_of(clients, first)
    before = saved_files(1)
    personal = ask(clients, evaluation_only(next_instruction(first, round=2, saved=1)))
    plain = ask(clients, evaluation_only(replace(first, round=2)))
    assert personal.metrics["loss"] != plain.metrics["loss"]
    assert saved_files(1) == before


def saved_files(client: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in client_folder(RUN, client).iterdir()}


def measurements(instruction: Instruction) -> list[Any]:
    """Most clients send something that must be refused; client 4 does not reply."""
    quality = {"accuracy": 0.5, "f1": 0.4, "loss": 1.0}
    good = EvaluationReply(instruction.round, instruction.client, instruction.nonce, 8, quality)
    bad = {
        1: replace(good, nonce="another"),
        2: replace(good, metrics={**quality, "accuracy": 1.5}),
        3: Failure(9, "asleep", lost=True),
        5: update_for(instruction),
        6: replace(good, metrics={**quality, "loss": float("nan")}),
        7: replace(good, rows=0),
        8: replace(good, round=1),
        10: replace(good, metrics={"accuracy": 0.5, "loss": 1.0}),
        11: replace(good, metrics={**quality, "perplexity": 2.0}),
        12: replace(good, metrics={}),
        13: replace(good, metrics={**quality, "loss": -0.1}),
    }
    return [] if instruction.client == 4 else [bad.get(instruction.client, good)]


def test_wrong_replies_are_refused(prepare_with: Callable[..., Prepared]) -> None:
    prepared = prepare_with("clients=14")
    setup, method, transport = prepared.setup, prepared.method, Scripted(measurements)
    evaluation = evaluate_clients(setup, method, transport, prepared.state, 4)
    assert [each.client for each in evaluation.measurements] == [0, 9]
    assert {failure.client: failure.reason for failure in evaluation.failures} == {
        1: "refused: does not carry this instruction's nonce",
        2: "refused: its measurement has impossible values",
        3: "asleep",
        4: "sent no reply",
        5: "refused: sent an update in place of an evaluation",
        6: "refused: its measurement has impossible values",
        7: "refused: its measurement has impossible values",
        8: "refused: replies to round 1, client 8",
        **dict.fromkeys(range(10, 14), "refused: its measurement has impossible values"),
    }


def test_no_more_clients_are_asked_at_once_than_in_a_round(
    prepare_with: Callable[..., Prepared],
) -> None:
    prepared = prepare_with("clients=7", "cohort_size=3")
    asked: list[int] = []

    class Counting(Scripted):
        def exchange(self, instructions: Any) -> Any:
            asked.append(len(instructions))
            yield from super().exchange(instructions)

    evaluation = evaluate_clients(
        prepared.setup, prepared.method, Counting(measurements), prepared.state, 4
    )
    assert asked == [3, 3, 1]  # client 3 claims to have lost a state that it never saved
    assert [failure.client for failure in evaluation.failures] == [1, 2, 3, 4, 5, 6]


def test_a_client_that_lost_its_state_is_measured_with_the_model_it_would_start_with(
    words: list[str], tmp_path: Path, state: Path
) -> None:
    """With the method `local` that is the initial model; no client is left out of the mean."""

    forgetful = interfering(
        lambda instruction: instruction.evaluate_only and instruction.client != 1, Path.unlink
    )
    start, config = Recorder(), load_config(None, words)
    result = start_run(config, tmp_path / "run", start, forgetful)
    assert (result["personalised_lost"], result["personalised_failures"]) == ([0, 2], [])
    plain = start_run(config, tmp_path / "plain", Recorder())
    assert plain["personalised_lost"] == []
    rates = ("learning_rate", "head_learning_rate")
    never = start_run(
        load_config(None, [*words, "rounds=1", *(f"training.{name}=1e-12" for name in rates)]),
        tmp_path / "never",
        Recorder(),
    )
    for client, source in ((0, never), (1, plain), (2, never)):
        measured, expected = (run["personalised"][client] for run in (result, source))
        assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert plain["personalised"][0]["loss"] != pytest.approx(never["personalised"][0]["loss"])


def test_every_client_has_the_same_weight() -> None:
    accuracies = (0.9, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 0.3)
    evaluation = ClientEvaluation(
        tuple(
            EvaluationReply(1, d, "", 10 + d, {"accuracy": a, "loss": 1.0})
            for d, a in enumerate(accuracies)
        ),
        (),
        2.0,
    )
    sums = summarise_clients(evaluation, {0: 2, 10: 1}, ACCURACY)
    assert sums["personalised_accuracy"] == pytest.approx(5.4 / 11)
    # A tenth of eleven clients, rounded up: .2 and .3.
    assert sums["personalised_worst_tenth"] == pytest.approx(0.25)
    assert sums["personalised_deviation"] == pytest.approx(np.std(accuracies))
    assert sums["personalised_accuracy_trained"] == pytest.approx(0.6)
    assert (sums["personalised_clients"], sums["personalised_rows"]) == (11, 165)
    assert sums["personalised"][0] == {
        "client": 0,
        "participations": 2,
        "rows": 10,
        "accuracy": 0.9,
        "loss": 1.0,
    }


def test_the_worst_tenth_has_the_largest_losses() -> None:
    losses = (0.9, 0.2, 3.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 2.0)
    evaluation = ClientEvaluation(
        tuple(
            EvaluationReply(1, client, "", 10, {"loss": loss, "perplexity": math.exp(loss)})
            for client, loss in enumerate(losses)
        ),
        (),
        2.0,
    )
    sums = summarise_clients(evaluation, {2: 1}, LOSS)
    assert sums["personalised_loss"] == pytest.approx(9.7 / 11)
    assert sums["personalised_worst_tenth"] == pytest.approx(2.5)  # 3.0 and 2.0
    assert sums["personalised_loss_trained"] == 3.0
    assert "personalised_accuracy" not in sums
    assert sums["personalised"][1]["perplexity"] == math.exp(0.2)


def test_without_measurements_there_is_no_accuracy() -> None:
    sums = summarise_clients(ClientEvaluation((), (Failure(0, "asleep"),), 0.0), {}, ACCURACY)
    assert sums["personalised_accuracy"] is sums["personalised_worst_tenth"] is None
    assert sums["personalised_failures"] == [{"client": 0, "reason": "asleep"}]


# Whole runs


LOCAL = ("method=local", "clients=3", "rounds=5")


@pytest.fixture(scope="module")
def words(tiny_overrides: list[str]) -> list[str]:
    return [*(word for word in tiny_overrides if not word.startswith("dropout.")), *LOCAL]


@pytest.fixture(scope="module")
def local_run(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the method ``local``, which tests must only read."""
    out = tmp_path_factory.mktemp("local") / "run"
    start_run(load_config(None, words), out, Recorder())
    return out


def test_a_local_run_has_no_global_accuracy_and_sends_tensors_once(local_run: Path) -> None:
    result = json.loads((local_run / "result.json").read_text())
    assert result["global_accuracy"] is result["adapter_sha256"] is result["best_accuracy"] is None
    assert result["personalised_clients"] == 3
    rows = rows_of(local_run / "clients.jsonl")
    assert all(row["upload_bytes"] == 0 for row in rows)
    seen: set[int] = set()
    for row in rows:
        assert (row["download_bytes"] > 0) == (row["client"] not in seen)
        seen.add(row["client"])
    assert [one["participations"] for one in result["personalised"]] == [
        sum(row["client"] == client for row in rows) for client in range(3)
    ]


def test_a_round_that_clients_saved_and_the_server_did_not_is_run_again(
    words: list[str], local_run: Path, tmp_path: Path
) -> None:
    """The server stops after the clients of round 3 have saved their tensors."""

    class Stopping(Recorder):
        def replied(self, reply: Any) -> None:
            super().replied(reply)
            if isinstance(reply, Update) and reply.round == 3 and len(self.replies) % 2 == 0:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        start_run(load_config(None, words), tmp_path / "run", Stopping())
    resume_run(tmp_path / "run", Recorder())
    assert outcome_without_adapter(tmp_path / "run") == outcome_without_adapter(local_run)


def outcome_without_adapter(out: Path) -> Any:
    (out / "adapter").mkdir()  # a local run has no adapter
    result = outcome(out)
    (out / "adapter").rmdir()
    return result


def test_a_client_that_lost_its_state_starts_again(
    words: list[str], tmp_path: Path, state: Path
) -> None:
    """One participation is lost; the next instruction brings all tensors."""

    forgetful = interfering(
        lambda instruction: instruction.round == 3 and not instruction.evaluate_only, Path.unlink
    )
    config = load_config(None, [*words, "clients=2", "rounds=5"])
    start_run(config, tmp_path / "run", Recorder(), forgetful)
    rows = rows_of(tmp_path / "run" / "clients.jsonl")
    third = [row for row in rows if row["round"] == 3]
    assert [row["reason"] for row in third] == [
        "the state that it saved in round 2 is missing or damaged"
    ] * 2
    fourth = [row for row in rows if row["round"] == 4]
    assert all(row["accepted"] and row["download_bytes"] > 0 for row in fourth)
    assert all(row["download_bytes"] == 0 for row in rows if row["round"] == 5)


def test_a_run_without_any_measurement_can_be_resumed(
    words: list[str], local_run: Path, tmp_path: Path
) -> None:
    """Its result is not written before there is a measurement."""

    class Gone:
        def __init__(self, inner: InProcess) -> None:
            self.inner = inner

        def exchange(self, instructions: Any) -> Any:
            for arrival in self.inner.exchange(instructions):
                gone = Failure(instructions[arrival.index].client, "asleep")
                yield replace(arrival, reply=gone) if instructions[0].evaluate_only else arrival

    out = tmp_path / "run"
    with pytest.raises(DroppeftError, match=r"no client could be measured \(client 0: asleep\)"):
        start_run(
            load_config(None, words),
            out,
            Recorder(),
            lambda loaded: nullcontext(Gone(InProcess(clients_of(loaded)))),
        )
    assert not (out / "result.json").exists()
    resume_run(out, Recorder())
    assert outcome_without_adapter(out) == outcome_without_adapter(local_run)


def test_a_local_run_has_no_global_model_to_export(local_run: Path) -> None:
    with pytest.raises(DroppeftError, match=r"no global model with .*; name a client"):
        export_run(local_run)


def test_the_evaluation_of_clients_can_be_left_out(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    config = load_config(None, [*tiny_overrides, "evaluation.personalised=false", "rounds=1"])
    start_run(config, tmp_path / "run", Recorder())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["personalised_accuracy"] is None
    assert (result["personalised_clients"], result["personalised"]) == (0, [])
    assert quality_line(result) == f"accuracy {result['global_accuracy']:.4f}"


def test_a_measurement_in_place_of_an_update_is_refused(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    class Confused:
        def exchange(self, instructions: Any) -> Any:
            for index, instruction in enumerate(instructions):
                yield Arrival(
                    index,
                    EvaluationReply(
                        instruction.round,
                        instruction.client,
                        instruction.nonce,
                        1,
                        {"accuracy": 1.0},
                    ),
                )

    with pytest.raises(DroppeftError, match="refused: sent an evaluation in place of an update"):
        start_run(
            load_config(None, tiny_overrides),
            tmp_path / "run",
            Recorder(),
            lambda loaded: nullcontext(Confused()),
        )


@pytest.mark.parametrize("key", [0, 17, "head", "other"])
def test_a_layer_key_can_be_read_from_its_text(key: Any) -> None:
    assert layer_key(str(key)) == key
