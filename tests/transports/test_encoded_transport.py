"""Encoded traffic: what the server merges, error feedback, and what is refused."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from droppeft.client.rounding_errors import encoded_update, load_errors, save_errors
from droppeft.config import load_config
from droppeft.messages.encoding import decode_tensors, encode, tensor_bytes
from droppeft.messages.instruction import Instruction, instruction_bytes
from droppeft.messages.reply import Failure, Update
from droppeft.messages.tensors import Layout, Tensors, flatten
from droppeft.runs import checkpoints
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.transports.base import Arrival
from droppeft.transports.encoding import EncodingTransport, encoded_instruction
from handmade import instruction_for, update_for
from runs import Recorder, delivered_model, outcome, rows_of

RNG = np.random.default_rng(0)


class Replying:
    """A transport whose clients add a change to what they receive."""

    def __init__(self, change: float, layout: Layout) -> None:
        self.change, self.layout = change, layout
        self.received: list[Instruction] = []

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        for index, sent in enumerate(instructions):
            values = decode_tensors(sent.tensors, sent.encoding, self.layout)
            instruction = replace(sent, tensors=values)
            self.received.append(instruction)
            trained = changed(values, self.change)
            tensors, _ = encoded_update(instruction, trained, {})
            yield Arrival(index, replace(update_for(instruction), tensors=tensors))


def changed(tensors: Tensors, change: float) -> Tensors:
    return {
        key: {name: (array + change).astype(np.float32) for name, array in named.items()}
        for key, named in tensors.items()
    }


def layout_of(tensors: Tensors) -> Layout:
    return {name: (key, array.shape) for key, name, array in flatten(tensors)}


def instruction_with(encoding: str) -> Instruction:
    tensors = {0: {"a": RNG.normal(size=(8, 40)).astype(np.float32)}}
    return replace(instruction_for(), tensors=tensors, encoding=encoding)


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_the_server_adds_the_change_to_its_own_value(encoding: str) -> None:
    instruction = instruction_with(encoding)
    layout = layout_of(instruction.tensors)
    inner = Replying(0.001, layout)
    transport = EncodingTransport(inner, lambda spec: layout)
    (arrival,) = transport.exchange([instruction])
    assert isinstance(arrival.reply, Update)
    held, merged = instruction.tensors[0]["a"], arrival.reply.tensors[0]["a"]
    # Rounding the values would lose more than the whole change.
    assert np.abs(inner.received[0].tensors[0]["a"] - held).max() > 0.001
    assert np.allclose(merged - held, 0.001, atol=2e-5)


def test_fp32_changes_nothing() -> None:
    instruction = instruction_with("fp32")
    assert encoded_instruction(instruction) is instruction
    assert instruction_bytes(instruction) == 8 * 40 * 4


def test_bytes_are_those_that_travel() -> None:
    for encoding in ("fp32", "bf16", "int8"):
        instruction = instruction_with(encoding)
        sent = encoded_instruction(instruction).tensors[0]["a"]
        assert instruction_bytes(instruction) == sent.nbytes
        assert tensor_bytes(instruction.tensors, encoding) == sent.nbytes


def test_what_rounding_loses_is_in_later_updates() -> None:
    instruction = instruction_with("int8")
    change = RNG.normal(size=(8, 40)).astype(np.float32) * 1e-3
    change[0, 0] = 1.0  # so that most other changes are below half a step
    trained = {0: {"a": instruction.tensors[0]["a"] + change}}
    layout, errors, total = layout_of(trained), {}, 0.0
    for _ in range(50):
        sent, errors = encoded_update(instruction, trained, errors)
        total = total + decode_tensors(sent, "int8", layout)[0]["a"]
    without, _ = encoded_update(instruction, trained, {})
    alone = 50 * decode_tensors(without, "int8", layout)[0]["a"]
    assert np.abs(total - 50 * change).max() < 0.01
    assert np.abs(alone - 50 * change).max() > 0.05


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_errors_outlive_a_training_that_diverged_and_one_without_the_tensor(encoding: str) -> None:
    instruction = instruction_with(encoding)
    diverged = {0: {"a": np.full((8, 40), np.inf, np.float32)}}
    earlier = {"b": np.full(3, 0.5, np.float32)}
    _, errors = encoded_update(instruction, diverged, earlier)
    assert errors == earlier


def test_another_encoding_is_refused() -> None:
    instruction = instruction_with("int8")
    layout = layout_of(instruction.tensors)

    class Hostile:
        def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
            update = update_for(instructions[0])
            yield Arrival(0, replace(update, tensors=instruction.tensors))

    (arrival,) = EncodingTransport(Hostile(), lambda spec: layout).exchange([instruction])
    assert isinstance(arrival.reply, Failure)
    assert "another encoding" in arrival.reply.reason


def test_errors_are_those_before_the_round(state: Path) -> None:
    for round in (1, 2, 3, 5):
        save_errors("ab", 0, round, {"a": np.full(3, round, np.float32)})
    assert load_errors("ab", 0, 5)["a"][0] == 3
    assert load_errors("ab", 0, 9)["a"][0] == 5
    assert not load_errors("ab", 0, 2)  # beyond the files that are retained
    assert not load_errors("ab", 1, 9)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path))
    return tmp_path


def test_encode_leaves_fp32_alone() -> None:
    values = np.ones(3, np.float32)
    assert encode(values, "fp32") is values


def test_a_round_that_is_repeated_begins_with_the_same_errors(
    tiny_overrides: list[str], tmp_path: Path, state: Path
) -> None:
    words = [*tiny_overrides, "traffic.encoding=int8", "clients=2"]
    outs = tmp_path / "whole", tmp_path / "crashed"
    start_run(load_config(None, words), outs[0], Recorder())
    with pytest.MonkeyPatch.context() as patch:
        saves = iter([True, True, False])
        original = checkpoints.save

        def crashing(*values: Any) -> None:
            if not next(saves):
                raise OSError("disk full")
            original(*values)

        patch.setattr(checkpoints, "save", crashing)
        with pytest.raises(OSError, match="disk full"):
            start_run(load_config(None, words), outs[1], Recorder())
    resume_run(outs[1], Recorder())
    assert outcome(outs[0]) == outcome(outs[1])
    assert {*state.iterdir()} == {*outs}  # nothing is left of the state of runs that have ended
    rows = rows_of(outs[0] / "clients.jsonl")
    assert max(row["upload_bytes"] for row in rows) < 0.3 * 4 * parameters_of(outs[0])


def parameters_of(out: Path) -> int:
    """Number of trained values of a run."""
    return sum(array.size for _, _, array in flatten(delivered_model(out).tensors))
