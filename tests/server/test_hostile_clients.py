"""Whole runs in which clients send extreme values, or nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from droppeft import seeds
from droppeft.client.run_inputs import Loaded, clients_of
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.transports.base import Arrival, Transport
from droppeft.transports.in_process import InProcess
from handmade import assert_same
from runs import Recorder, checkpoint_of, rows_of

Change = Callable[[Instruction, Reply], Reply | None]
EVERYBODY = ("method=fedlora", "cohort_size=4", "training.local_steps=1")


def changing(change: Change) -> Callable[[Loaded], AbstractContextManager[Transport]]:
    """A transport in this process on which replies are changed, or lost if there is none."""

    class Changes:
        def __init__(self, inner: InProcess) -> None:
            self.inner = inner

        def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
            for arrival in self.inner.exchange(instructions):
                reply = change(instructions[arrival.index], arrival.reply)
                if reply is not None:
                    yield Arrival(arrival.index, reply)

    return lambda loaded: nullcontext(Changes(InProcess(clients_of(loaded))))


def extreme_in(*rounds: int) -> Change:
    """All clients but the first send the largest floats in these rounds."""

    def change(instruction: Instruction, reply: Reply) -> Reply:
        if not isinstance(reply, Update) or instruction.round not in rounds or not reply.client:
            return reply
        tensors = {
            key: {name: np.full_like(value, 3.4e38) for name, value in named.items()}
            for key, named in reply.tensors.items()
        }
        return replace(reply, tensors=tensors)

    return change


@contextmanager
def nobody_may_reply() -> Iterator[None]:
    """Go on after the error of a run in which nobody replied in three rounds."""
    try:
        yield
    except DroppeftError as error:
        if "in 3 rounds in a row" not in str(error):
            raise


def words(tiny_overrides: list[str], *more: str) -> list[str]:
    return [*(w for w in tiny_overrides if not w.startswith("dropout")), *EVERYBODY, *more]


def test_a_round_of_extreme_values_changes_nothing(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    config = load_config(None, words(tiny_overrides))
    result = start_run(config, tmp_path / "run", Recorder(), changing(extreme_in(3)))
    rows = rows_of(tmp_path / "run" / "rounds.jsonl")
    assert [(row["accepted"], row["diverged"]) for row in rows] == [
        (4, False),
        (4, False),
        (0, True),
    ]
    assert "the losses of its model are not finite" in rows[2]["failures"][0]["reason"]
    before, after = (checkpoint_of(tmp_path / "run", round).state.model for round in (2, 3))
    assert_same(before.tensors, after.tensors)
    assert result["global_loss"] is not None


def test_a_run_returns_to_its_last_evaluated_model(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Round 1 is not evaluated, and the run is stopped after it."""

    class Stops(Recorder):
        def round_done(self, row: object) -> None:
            raise OSError("disk full")

    out = tmp_path / "run"
    config = load_config(None, words(tiny_overrides, "evaluation.every=2"))
    with pytest.raises(OSError, match="disk full"):
        start_run(config, out, Stops(), changing(extreme_in(1)))
    listener = Recorder()
    result = resume_run(out, listener)
    assert "the model of round 1 is not finite; returning to round 0" in listener.steps
    assert [row.round for row in listener.rows] == [1, 2, 3]
    assert not any(row.diverged for row in listener.rows)
    assert result["global_loss"] is not None


def test_a_model_that_is_found_bad_later_gives_way_to_the_last_evaluated_one(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    """It is merged in round 1, and evaluated after round 2, in which nobody can train on it."""
    config = load_config(None, words(tiny_overrides, "evaluation.every=2"))
    start_run(config, tmp_path / "run", Recorder(), changing(extreme_in(1)))
    rows = rows_of(tmp_path / "run" / "rounds.jsonl")
    assert [(row["accepted"], row["diverged"]) for row in rows] == [
        (4, False),
        (0, True),
        (4, False),
    ]


@pytest.mark.sample("0.4")
@pytest.mark.parametrize("part", [0.1, 0.4, 0.7])
def test_every_drawn_client_is_accounted_for(
    part: float, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Thirty rounds, in which a part of the replies is lost; a run that stops is resumed."""

    def lose(instruction: Instruction, reply: Reply) -> Reply | None:
        if instruction.evaluate_only:
            return reply
        rng = seeds.numpy_generator(
            7, purpose="losses", round=instruction.round, client=instruction.client
        )
        if rng.random() >= part:
            return reply
        return Failure(instruction.client, "fell asleep") if rng.random() < 0.5 else None

    more = (
        *("rounds=30", "cohort_size=3", "clients=5", "evaluation.every=10"),
        *("clock.over_selection=1.34", "clock.profiles=phone,jetson_tx2"),
        *("evaluation.personalised=false", "server.max_weight_multiple=1"),
    )
    out = tmp_path / "run"
    config, connect = load_config(None, words(tiny_overrides, *more)), changing(lose)
    with nobody_may_reply():
        start_run(config, out, Recorder(), connect)
    while not (out / "result.json").exists():
        with nobody_may_reply():
            resume_run(out, Recorder(), connect)
    rows, clients = rows_of(out / "rounds.jsonl"), rows_of(out / "clients.jsonl")
    assert len(rows) == 30
    for row in rows:
        failed = [failure["client"] for failure in row["failures"]]
        accepted = [
            one["client"] for one in clients if one["round"] == row["round"] and one["accepted"]
        ]
        found = [
            *accepted,
            *failed,
            *row["late"],
            *row["surplus"],
            *row["set_aside"],
            *row["opposed"],
        ]
        assert sorted(found) == row["cohort"]
        assert len(accepted) == row["accepted"]
        assert len(row["cohort"]) + len(row["absent"]) == 5
    assert any(row["failures"] for row in rows)
    assert any(row["absent"] for row in rows)
