"""The round that a run delivers is chosen by the loss on clients' validation rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from droppeft.client.run_inputs import Loaded, clients_of
from droppeft.config import load_config
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import EvaluationReply, Failure
from droppeft.messages.tensors import flatten
from droppeft.refusals import Refused
from droppeft.runs import export
from droppeft.runs.ledger import RoundRow
from droppeft.server.delivered_round import delivered_round, validation_clients
from droppeft.server.run import start_run
from droppeft.transports.base import Arrival
from droppeft.transports.in_process import InProcess
from runs import Recorder, checkpoint_of, rows_of


class Measures:
    """The transport in process, but clients report these validation losses, by round."""

    def __init__(self, loaded: Loaded, losses: Mapping[int, float | None]) -> None:
        self.inner = InProcess(clients_of(loaded))
        self.losses = losses
        self.asked: list[Instruction] = []

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        for arrival in self.inner.exchange(instructions):
            instruction, reply = instructions[arrival.index], arrival.reply
            if instruction.validation_rows and isinstance(reply, EvaluationReply):
                self.asked.append(instruction)
                loss = self.losses[instruction.round]
                if loss is None:
                    yield replace(arrival, reply=Failure(instruction.client, "asleep"))
                    continue
                reply = replace(reply, metrics={**reply.metrics, "loss": loss})
            yield replace(arrival, reply=reply)


def run_with(
    words: Sequence[str], out: Path, losses: Mapping[int, float | None], *more: str
) -> tuple[dict[str, Any], list[Instruction]]:
    used: list[Measures] = []

    def connect(loaded: Loaded) -> Any:
        used.append(Measures(loaded, losses))
        return nullcontext(used[-1])

    result = start_run(load_config(None, [*words, *more]), out, Recorder(), connect)
    return result, used[0].asked


def test_the_model_with_the_lowest_validation_loss_is_delivered(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result, asked = run_with(
        tiny_overrides, out, {1: 0.9, 2: 0.5, 3: 0.8, 4: 0.9, 5: 0.8}, "rounds=5"
    )
    assert (result["delivered_round"], result["rounds"]) == (2, 5)
    assert result["personalised_round"] == 2  # no client keeps layers of its own
    rounds = rows_of(out / "rounds.jsonl")
    assert [row["validation_loss"] for row in rounds] == pytest.approx([0.9, 0.5, 0.8, 0.9, 0.8])
    kept = sorted(path.stem for path in (out / "checkpoints").iterdir())
    assert kept == ["round-00000", "round-00002", "round-00004", "round-00005"]
    config, delivered = export.saved_model(out, None, None)
    assert delivered.round == 2
    assert export.saved_model(out, 5, None)[1].round == 5
    # The same three clients in every round.
    by_round = {
        one.round: [each.client for each in asked if each.round == one.round] for one in asked
    }
    assert list(by_round.values()) == [validation_clients(config)] * 5
    assert len(set(validation_clients(config))) == 3
    assert {one.validation_rows for one in asked} == {7}  # evaluation.rows=20 in all


def test_clients_measure_the_global_model_on_their_validation_rows(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    out, replies = tmp_path / "run", []

    class Listens(Measures):
        def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
            for arrival in self.inner.exchange(instructions):
                if instructions[arrival.index].validation_rows:
                    replies.append((instructions[arrival.index], arrival.reply))
                yield arrival

    config = load_config(None, [*tiny_overrides, "rounds=1", "evaluation.rows=6"])
    loaded: list[Loaded] = []

    def connect(one: Loaded) -> Any:
        loaded.append(one)
        return nullcontext(Listens(one, {}))

    start_run(config, out, Recorder(), connect)
    tensors = checkpoint_of(out).state.model.tensors
    for instruction, reply in replies:
        sent = {name: array for _, name, array in flatten(instruction.tensors)}
        assert all(np.array_equal(sent[name], array) for _, name, array in flatten(tensors))
        validation = loaded[0].clients[instruction.client].validation
        assert cast(EvaluationReply, reply).rows == min(2, len(validation))
    [row] = rows_of(out / "rounds.jsonl")
    total = sum(reply.rows for _, reply in replies)
    mean = sum(reply.metrics["loss"] * reply.rows for _, reply in replies) / total
    assert row["validation_loss"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("losses", "delivered"),
    [
        ([0.9, 0.5, 0.4], 3),
        ([0.9, 0.5, 0.519], 3),  # not clearly worse
        ([0.9, 0.5, 0.53], 2),
        ([0.5, 0.9, 0.5], 3),
        ([0.5, 0.5, 0.7], 1),
        ([0.9, 0.5, None], 2),  # diverged, or a client is missing
        ([None, None, None], 3),
        ([None, None, 0.5], 3),
    ],
)
def test_the_last_round_is_delivered_unless_another_is_clearly_better(
    losses: list[float | None], delivered: int
) -> None:
    rows = [
        SimpleNamespace(round=round, validation_loss=loss)
        for round, loss in enumerate(losses, start=1)
    ]
    assert delivered_round(cast("list[RoundRow]", rows)) == delivered


def test_a_missing_client_leaves_a_round_without_a_loss(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    result, _ = run_with(tiny_overrides, tmp_path / "run", {1: 0.5, 2: None, 3: None})
    losses = [row["validation_loss"] for row in rows_of(tmp_path / "run" / "rounds.jsonl")]
    assert losses == [pytest.approx(0.5), None, None]
    assert result["delivered_round"] == 1


def test_a_client_that_never_measures_does_not_count(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    class OneRefuses(Measures):
        def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
            for arrival in super().exchange(instructions):
                one = instructions[arrival.index]
                if one.validation_rows and one.client == self.asked[0].client:
                    refused = Failure.of(one.client, Refused("too_few_rows", 20))
                    yield replace(arrival, reply=refused)
                else:
                    yield arrival

    def connect(loaded: Loaded) -> Any:
        return nullcontext(OneRefuses(loaded, {1: 0.5, 2: 0.9, 3: None}))

    result = start_run(load_config(None, tiny_overrides), tmp_path / "run", Recorder(), connect)
    losses = [row["validation_loss"] for row in rows_of(tmp_path / "run" / "rounds.jsonl")]
    assert losses == [pytest.approx(0.5), pytest.approx(0.9), None]
    assert result["delivered_round"] == 1


def test_without_validation_clients_the_last_round_is_delivered(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    result, asked = run_with(
        tiny_overrides, tmp_path / "run", {}, "evaluation.validation_clients=0"
    )
    assert (asked, result["delivered_round"]) == ([], 3)


def test_clients_with_layers_of_their_own_keep_those_of_the_last_round(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result, _ = run_with(tiny_overrides, out, {1: 0.5, 2: 0.9, 3: 0.9}, "sharing.fraction=0.5")
    assert (result["delivered_round"], result["personalised_round"]) == (1, 3)
    assert export.saved_model(out, None, client=0)[1].round == 3
    recorded = json.loads((out / "result.json").read_text())["personalised"][0]["accuracy"]
    exported = export.export_run(out, tmp_path / "adapter", client=0)
    assert exported.value == recorded
