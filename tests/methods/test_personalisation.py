"""Methods with personal tensors: what stays on the client, and with what it begins next time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from droppeft.client.client_state import client_folder, load_tensors
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import EvaluationReply
from droppeft.messages.tensors import HEAD, flatten
from droppeft.server.prepare import Prepared, prepare
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from runs import Recorder, outcome, rows_of, stop_after_a_round, update_of

pytestmark = pytest.mark.usefixtures("state")

RUN = "00c0ffee"


@pytest.fixture
def plain(tiny_overrides: list[str]) -> list[str]:
    return [override for override in tiny_overrides if not override.startswith("dropout.")]


@pytest.fixture
def prepare_with(plain: list[str]) -> Callable[..., Prepared]:
    return lambda *overrides: prepare(
        load_config(None, [*plain, *overrides]), lambda step: None, RUN
    )


def first_instruction(prepared: Prepared) -> Instruction:
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [1])
    return instruction


def distance(one: Any, other: Any) -> float:
    pairs = zip(flatten(one), flatten(other), strict=True)
    return float(np.sqrt(sum(np.square(a - b).sum() for (_, _, a), (_, _, b) in pairs)))


# Ditto


def test_without_a_pull_the_first_personal_adapter_is_the_shared_one(
    prepare_with: Callable[..., Prepared],
) -> None:
    """Both train on the same batches from the same values; only the pull may differ."""
    prepared = prepare_with("method=ditto", "ditto.pull=0")
    reply = update_of(clients_of(prepared.loaded), first_instruction(prepared))
    assert distance(load_tensors(client_folder(RUN, 1), 1), reply.tensors) == 0
    assert (reply.cost.personal_steps, reply.cost.personal_tokens) == (
        reply.steps,
        reply.cost.tokens,
    )


def test_the_pull_is_towards_the_received_values(prepare_with: Callable[..., Prepared]) -> None:
    """Also in a later round, which begins with the saved personal adapter."""
    prepared = prepare_with("method=ditto", "training.local_steps=6")
    clients, instruction = clients_of(prepared.loaded), first_instruction(prepared)
    shared = update_of(clients, instruction)
    far = {k: {n: a + np.float32(1) for n, a in v.items()} for k, v in instruction.tensors.items()}
    later = replace(instruction, round=2, state_round=1, tensors=far, personal_adapter=0.0)
    distances = {}
    for pull in (0.0, 0.5, 50.0):
        reply = update_of(clients, replace(later, personal_adapter=pull))
        assert (
            distance(
                reply.tensors, update_of(clients, replace(later, personal_adapter=None)).tensors
            )
            == 0
        )
        distances[pull] = distance(load_tensors(client_folder(RUN, 1), 2), far)
        update_of(clients, instruction)  # writes the client state again
    assert distances[0.0] > distances[0.5] > distances[50.0]
    assert distance(shared.tensors, far) > distances[50.0]


def test_ditto_shares_as_fedlora_and_evaluates_personal_adapters(
    plain: list[str], tmp_path: Path
) -> None:
    more = ("rounds=3", "clients=2", "training.learning_rate=0.02", "training.local_steps=4")
    runs = {}
    for method in ("fedlora", "ditto"):
        config = load_config(None, [*plain, *more, f"method={method}"])
        runs[method] = start_run(config, tmp_path / method, Recorder())
    assert runs["ditto"]["adapter_sha256"] == runs["fedlora"]["adapter_sha256"]
    assert runs["ditto"]["upload_bytes"] == runs["fedlora"]["upload_bytes"]
    losses = [client["loss"] for client in runs["ditto"]["personalised"]]
    assert losses != [client["loss"] for client in runs["fedlora"]["personalised"]]
    # Two adapters are trained, which takes twice the modelled time.
    rows = {m: rows_of(tmp_path / m / "clients.jsonl") for m in runs}
    for one, other in zip(rows["ditto"], rows["fedlora"], strict=True):
        ratio = one["train_modelled_s"] / other["train_modelled_s"]
        assert ratio == pytest.approx(2, rel=0.2)


@pytest.mark.sample("ditto")
@pytest.mark.parametrize("method", ["ditto", "fedsa_lora"])
def test_a_resumed_run_ends_the_same(plain: list[str], tmp_path: Path, method: str) -> None:
    overrides = [*plain, f"method={method}", "clients=3", "rounds=4"]
    start_run(load_config(None, overrides), tmp_path / "whole", Recorder())
    stop_after_a_round(overrides, tmp_path / "run")
    resume_run(tmp_path / "run", Recorder())
    for folder in ("run", "whole"):
        (tmp_path / folder / "adapter").mkdir(exist_ok=True)  # fedsa_lora exports none
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# FedSA-LoRA


def test_fedsa_sends_a_and_saves_b(prepare_with: Callable[..., Prepared]) -> None:
    prepared = prepare_with("method=fedsa_lora")
    clients, instruction = clients_of(prepared.loaded), first_instruction(prepared)
    reply = update_of(clients, instruction)
    saved = {name for _, name, _ in flatten(load_tensors(client_folder(RUN, 1), 1))}
    sent = {name for _, name, _ in flatten(reply.tensors)}
    assert saved == {name for _, name, _ in flatten(instruction.tensors) if ".lora_B." in name}
    assert sent == {name for _, name, _ in flatten(instruction.tensors)} - saved
    state = prepared.method.merge(prepared.setup, prepared.state, [instruction], [reply])
    [later] = prepared.method.instruct(prepared.setup, state, 2, [1])
    assert {name for _, name, _ in flatten(later.tensors)} == sent
    assert later.state_round == 1
    evaluation = prepared.method.evaluate_client(prepared.setup, state, 2, 1)
    measured = clients[1].run(evaluation)
    fresh = prepared.method.evaluate_client(prepared.setup, state, 2, 0)
    assert isinstance(measured, EvaluationReply)
    assert {name for _, name, _ in flatten(fresh.tensors)} == sent | saved
    assert HEAD in evaluation.tensors
