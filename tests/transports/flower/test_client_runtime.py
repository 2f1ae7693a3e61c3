"""What runs on a node, and in a simulation: what is loaded, how often, and what leaves."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from droppeft.client.client import Client
from droppeft.client.run_inputs import identity
from droppeft.client.site_config import published_settings
from droppeft.config import as_tree
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.refusals import Refused
from droppeft.server.prepare import Prepared
from droppeft.transports.flower import client_app, client_runtime, node_log, simulated_clients
from droppeft.transports.flower.client_runtime import run_packed
from droppeft.transports.flower.records import packed_of, record_of
from droppeft.transports.flower.simulated_clients import run_simulated
from droppeft.transports.flower.wire_format import (
    Packed,
    RunContext,
    pack_instruction,
    unpack_reply,
)
from droppeft.transports.registry import in_process
from runs import published_for

MOST = 10**8


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    """Tests do not see what other tests loaded."""
    yield
    client_runtime._client.cache_clear()
    simulated_clients._clients.cache_clear()


@pytest.fixture
def for_sites(prepared: Prepared) -> RunContext:
    return RunContext(published_settings(prepared.config), published_for(prepared))


@pytest.fixture
def instruction(instructions: list[Instruction]) -> Instruction:
    """For client 1."""
    return instructions[1]


NodeFiles = Callable[..., Path]


@pytest.fixture
def node_file(prepared: Prepared, tmp_path: Path) -> NodeFiles:
    """Write the file of a site that has the data and the model of the prepared run."""

    def write(*lines: str, **changes: Any) -> Path:
        config = prepared.config
        values = {"client": 1, "data": config.data, "model": config.model, **changes}
        top = [f"{name} = {value!r}" for name, value in values.items() if value is not None]
        path = tmp_path / "node.toml"
        path.write_text("\n".join([*top, *lines]))
        return path

    return write


def ask(instruction: Instruction, run_context: RunContext, node_file: Path) -> Reply:
    packed = run_packed(pack_instruction(instruction, run_context), str(node_file))
    return unpack_reply(packed, MOST)


def simulate(instruction: Instruction, run_context: RunContext) -> Reply:
    packed = run_simulated(pack_instruction(instruction, run_context))
    return unpack_reply(packed, MOST, simulated=True)


def reason(reply: Reply) -> str:
    assert isinstance(reply, Failure)
    return reply.reason


def test_a_site_is_loaded_once(
    instruction: Instruction, for_sites: RunContext, node_file: NodeFiles
) -> None:
    path = node_file()
    replies = [ask(instruction, for_sites, path) for _ in range(2)]
    assert isinstance(replies[0], Update)
    assert isinstance(replies[1], Update)
    assert replies[0].train_loss == replies[1].train_loss
    assert client_runtime._client.cache_info().misses == 1


def test_files_and_machine_are_those_of_the_node_file(
    instruction: Instruction,
    for_sites: RunContext,
    node_file: NodeFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the server sends, and with the seed of the server."""
    seen: list[Any] = []
    original = client_runtime.site_client

    def site_client(node: Any, task: Any, model: Any, config: Any) -> Client:
        seen.append(config)
        return original(node, task, model, config)

    monkeypatch.setattr(client_runtime, "site_client", site_client)
    monkeypatch.setenv("SECRET", "/canary")
    hostile = {
        **dict.fromkeys(("data", "model", "start_from", "out"), "$SECRET"),
        "source": {"text": ["$SECRET"], "label": "iban"},
        **{"threads": 64, "accelerator": "cuda", "tracker": "wandb", "seed": 5},
    }
    path = node_file('[source]\ntext = "text"', threads=2)
    context = replace(for_sites, config={**for_sites.config, **hostile})
    reply = ask(instruction, context, path)
    assert isinstance(reply, Update)
    [config] = seen
    assert "canary" not in str(config)
    assert (config.threads, config.seed, config.source.label) == (2, 5, None)
    assert (config.start_from, config.tracker) == (None, "none")
    assert torch.get_num_threads() == 2


CASES: dict[str, tuple[Callable[[RunContext], RunContext], dict[str, Any], str]] = {
    "another client": (lambda it: it, {"client": 2}, "says that it is client 2, not 1"),
    "no model": (lambda it: it, {"model": None}, "must say where it has the model"),
    "another model": (
        lambda it: replace(it, task=replace(it.task, model_hash="x")),
        {},
        "its model has other weights",
    ),
    "another tokenizer": (
        lambda it: replace(it, task=replace(it.task, tokenizer_hash="x")),
        {},
        "another tokenizer",
    ),
    "a missing file": (lambda it: it, {"data": "/nowhere/canary.csv"}, "(node.log) says why"),
    "an unknown key": (lambda it: it, {"canary": 3}, "(node.log) says why"),
    "no task": (lambda it: replace(it, task=None), {}, "cannot read its instruction"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_site_that_cannot_take_part_sends_a_code(
    case: str,
    instruction: Instruction,
    for_sites: RunContext,
    node_file: NodeFiles,
    state: Path,
) -> None:
    change, lines, said = CASES[case]
    reply = ask(instruction, change(for_sites), node_file(**lines))
    assert said in reason(reply)
    assert "canary" not in reason(reply)
    log = (state / "node.log").read_text()
    assert "client 1, round 1: " in log
    assert ("canary" in log) == ("canary" in str(lines))
    assert (state / "node.log").stat().st_mode & 0o077 == 0


def test_an_unexpected_error_stays_in_the_log(
    instruction: Instruction,
    for_sites: RunContext,
    node_file: NodeFiles,
    monkeypatch: pytest.MonkeyPatch,
    state: Path,
) -> None:
    def broken(*_: Any) -> Update:
        raise ZeroDivisionError("canary")

    monkeypatch.setattr(Client, "run", broken)
    packed = run_packed(pack_instruction(instruction, for_sites), str(node_file()))
    assert "canary" not in packed.head
    assert "Traceback" in (state / "node.log").read_text()


def test_the_log_is_private_also_after_it_was_renamed(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_log, "MOST_BYTES", 60)
    for _ in range(3):
        node_log.log_failure("client 0, round 1", DroppeftError("a reason of some length"))
    logs = [state / "node.log", state / "node.log.1"]
    assert [path.stat().st_mode & 0o077 for path in logs] == [0, 0]


def test_a_log_that_cannot_be_written_hides_no_reason(
    instruction: Instruction,
    for_sites: RunContext,
    node_file: NodeFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path / "file"))
    assert "client 2" in reason(ask(instruction, for_sites, node_file(client=2)))


def test_an_instruction_that_cannot_be_read_is_a_code(node_file: NodeFiles, state: Path) -> None:
    reply = unpack_reply(run_packed(Packed('{"canary": 1}', b""), str(node_file())), MOST)
    assert reason(reply).startswith("it cannot read its instruction")


@pytest.mark.parametrize("what", ["no node file", "no instruction", "other records"])
def test_the_app_raises_nothing_out(
    what: str,
    instruction: Instruction,
    for_sites: RunContext,
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flower would send the text of the error to the server."""
    for name, value in {"_task_id": 1, "_run_id": 2, "_node_id": 7}.items():
        monkeypatch.setattr(TaskIdentity, name, value)  # Flower allows messages only within a task
    packed = pack_instruction(instruction, for_sites)
    content = record_of(Packed("canary", b"") if what == "no instruction" else packed)
    if what == "other records":
        content = RecordDict({})
    node: Any = {} if what == "no node file" else {client_app.NODE_FILE: "/canary"}
    message = Message(content, dst_node_id=7, message_type="train")
    reply = client_app.app(message, Context(1, 7, node, RecordDict(), {}))
    said = reason(unpack_reply(packed_of(reply.content), MOST))
    assert ("no node file" in said) == (what == "no node file")
    assert "canary" not in said
    assert (state / "node.log").exists()


# Simulations


@pytest.fixture
def simulated(prepared: Prepared) -> RunContext:
    return RunContext(as_tree(prepared.config), identity=identity(prepared.loaded))


def test_a_simulated_reply_is_that_of_the_transport_in_process(
    prepared: Prepared, instructions: list[Instruction], simulated: RunContext
) -> None:
    with in_process(prepared.loaded) as transport:
        here = [arrival.reply for arrival in transport.exchange(instructions)]
    for instruction, expected in zip(instructions, here, strict=True):
        found = simulate(instruction, simulated)
        assert isinstance(expected, Update)
        assert isinstance(found, Update)
        assert (found.train_loss, found.importance) == (expected.train_loss, expected.importance)
    assert simulated_clients._clients.cache_info().misses == 1


@pytest.mark.parametrize("what", ["data", "split", "model"])
def test_files_that_changed_are_refused(
    instruction: Instruction, simulated: RunContext, what: str
) -> None:
    other = replace(simulated, identity={**simulated.identity, f"{what}_hash": "other"})
    said = reason(simulate(instruction, other))
    assert said.startswith(f"the {what} differs (expected other, found ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("no rows"), "ZeroDivisionError: no rows"),
        (DroppeftError("lower it"), "lower it"),
        (Refused("state_lost", 3), "the state that it saved in round 3 is missing or damaged"),
    ],
)
def test_a_simulated_error_is_a_failure_with_its_text(
    instruction: Instruction,
    simulated: RunContext,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    def broken(*_: Any) -> Update:
        raise error

    monkeypatch.setattr(Client, "run", broken)
    assert reason(simulate(instruction, simulated)) == said
