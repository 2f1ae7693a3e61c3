"""The client's side: what it loads and how often; errors become failures."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from droppeft.client.client import Client
from droppeft.client.run_inputs import identity
from droppeft.config import as_tree
from droppeft.messages import Failure, Instruction, Reply, Update
from droppeft.server.prepare import Prepared
from droppeft.transports.flower import client_runtime
from droppeft.transports.flower.client_runtime import run_packed
from droppeft.transports.flower.wire_format import (
    Packed,
    RunContext,
    pack_instruction,
    unpack_reply,
)
from droppeft.transports.in_process import in_process

MOST = 10**8


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    """Tests do not see what other tests loaded."""
    client_runtime._clients.cache_clear()
    yield
    client_runtime._clients.cache_clear()


@pytest.fixture
def run_context(prepared: Prepared) -> RunContext:
    return RunContext(as_tree(prepared.config), identity(prepared.loaded), model_server=False)


def ask(instruction: Instruction, run_context: RunContext, **node: Any) -> Reply:
    return unpack_reply(run_packed(pack_instruction(instruction, run_context), node), MOST)


def reason(reply: Reply) -> str:
    assert isinstance(reply, Failure)
    return reply.reason


def test_a_reply_is_that_of_the_transport_in_process(
    prepared: Prepared, instructions: list[Instruction], run_context: RunContext
) -> None:
    with in_process(prepared.loaded) as transport:
        [here] = [arrival.reply for arrival in transport.exchange(instructions[:1])]
    packed = ask(instructions[0], run_context)
    assert isinstance(here, Update)
    assert isinstance(packed, Update)
    assert (packed.train_loss, packed.importance) == (here.train_loss, here.importance)


def test_a_run_is_loaded_once(instructions: list[Instruction], run_context: RunContext) -> None:
    for instruction in instructions:
        assert isinstance(ask(instruction, run_context), Update)
    assert client_runtime._clients.cache_info().misses == 1
    assert isinstance(
        ask(instructions[0], run_context, threads=1, data=run_context.config["data"]), Update
    )
    assert client_runtime._clients.cache_info().misses == 1


def test_a_node_has_its_own_copies_and_settings(
    instructions: list[Instruction], run_context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = client_runtime.load

    def load(config: Any, say: Any) -> Any:
        seen.append(config)
        return original(config, say)

    monkeypatch.setattr(client_runtime, "load", load)
    moved = RunContext(
        {**run_context.config, "data": "/elsewhere"}, run_context.identity, model_server=False
    )
    data = run_context.config["data"]
    reply = ask(instructions[0], moved, data=data, threads=2, seed=99, **{"partition-id": 0})
    assert isinstance(reply, Update)
    assert (seen[0].data, seen[0].threads, seen[0].seed) == (data, 2, 0)


@pytest.mark.parametrize("overrides", [{"threads": 0}, {"accelerator": "auto"}], ids=str)
def test_automatic_settings_are_resolved_on_the_node(
    instructions: list[Instruction], run_context: RunContext, overrides: dict[str, Any]
) -> None:
    assert isinstance(ask(instructions[0], run_context, **overrides), Update)


def test_a_missing_accelerator_is_a_failure(
    instructions: list[Instruction], run_context: RunContext
) -> None:
    if not torch.cuda.is_available():
        assert "torch finds no CUDA device" in reason(
            ask(instructions[0], run_context, accelerator="cuda")
        )


@pytest.mark.parametrize("what", ["data", "split", "model"])
def test_another_copy_is_refused(
    instructions: list[Instruction], run_context: RunContext, what: str
) -> None:
    other = replace(run_context, identity={**run_context.identity, f"{what}_hash": "other"})
    said = reason(ask(instructions[0], other))
    assert said.startswith(f"the {what} differs (expected other, found ")
    assert said.endswith("this node's copy is not the server's")


def test_missing_data_are_a_failure(
    instructions: list[Instruction], run_context: RunContext
) -> None:
    assert "/nowhere" in reason(ask(instructions[0], run_context, data="/nowhere"))


def test_an_error_is_a_failure_with_its_name(
    instructions: list[Instruction], run_context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Update:
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr(Client, "run", broken)
    assert reason(ask(instructions[1], run_context)) == "ZeroDivisionError: no rows"


def test_an_instruction_that_cannot_be_read_is_a_failure() -> None:
    reply = unpack_reply(run_packed(Packed("{}", b""), {}), MOST)
    assert reason(reply).startswith("cannot read its instruction: ")
