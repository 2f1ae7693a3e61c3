"""Runs with offloaded weights: the same bits as without, and which layers are in memory when."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from droppeft.cached_layers.frozen_layers import FrozenLayers
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.messages.instruction import AdapterSpec, BaseDelta, LayerAdapter
from droppeft.models.offloading import OffloadedWeights
from droppeft.server.prepare import Prepared
from droppeft.server.run import start_run
from runs import Recorder, adapter_bytes, rows_of, timeless

OFFLOAD = "training.offload=true"
ROUND = ("dropout.every=round", "dropout.mean=0.5")
FROZEN = ("frozen.layers=2", "dropout.mean=0.25", "dropout.protect_first=0")


def run(overrides: list[str], out: Path, *more: str) -> tuple[dict[str, bytes], list[Any]]:
    start_run(load_config(None, [*overrides, *more]), out, Recorder())
    return adapter_bytes(out), [timeless(row) for row in rows_of(out / "clients.jsonl")]


@pytest.mark.sample("frozen.layers=2 * dropout.every=round")
@pytest.mark.parametrize("more", [ROUND, FROZEN, (*FROZEN, *ROUND[:1])], ids=" ".join)
def test_offloading_changes_neither_the_adapter_nor_the_ledger(
    more: tuple[str, ...], tiny_overrides: list[str], tmp_path: Path
) -> None:
    plain = run(tiny_overrides, tmp_path / "plain", *more)
    assert run(tiny_overrides, tmp_path / "offloaded", *more, OFFLOAD) == plain


@pytest.mark.sample("0.002")
@pytest.mark.parametrize("limit", ["0.002", "0.000001"])
def test_the_adapter_is_the_same_when_the_disk_holds_too_few_states(
    limit: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    small = (*FROZEN, f"frozen.limit_mb={limit}")
    plain, _ = run(tiny_overrides, tmp_path / "plain", *FROZEN)
    assert run(tiny_overrides, tmp_path / "offloaded", *small, OFFLOAD)[0] == plain


def train_client_0(prepared: Prepared, **changes: Any) -> Any:
    clients = clients_of(prepared.loaded)
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    instruction = replace(instruction, **changes)
    return instruction, clients[0].train(instruction)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The layers in memory, in order of time; fails if frozen layers run that are not in memory."""
    loaded: list[set[int]] = [set()]
    load, states = OffloadedWeights.load_layers, FrozenLayers.states

    def noting(self: OffloadedWeights, layers: Collection[int]) -> None:
        loaded.append(set(layers))
        load(self, layers)

    def checking(self: FrozenLayers, inputs: Any) -> Any:
        assert set(range(self.depth)) <= loaded[-1]
        return states(self, inputs)

    monkeypatch.setattr(OffloadedWeights, "load_layers", noting)
    monkeypatch.setattr(FrozenLayers, "states", checking)
    return loaded


def test_only_the_layers_that_run_are_in_memory(
    prepare_with: Callable[..., Prepared], loads: list[set[int]]
) -> None:
    _, update = train_client_0(prepare_with(OFFLOAD, *ROUND))
    ran = {layer for layer, steps in enumerate(update.active_steps) if steps}
    assert len(ran) == 2
    assert loads[-1] == ran


def test_states_are_computed_before_later_layers_are_loaded(
    prepare_with: Callable[..., Prepared], loads: list[set[int]]
) -> None:
    prepared = prepare_with(OFFLOAD, *FROZEN)
    del loads[:]
    train_client_0(prepared)
    assert loads == [{0, 1}, {2, 3}]


def test_frozen_layers_are_loaded_again_for_states_that_could_not_be_stored(
    prepare_with: Callable[..., Prepared], loads: list[set[int]]
) -> None:
    prepared = prepare_with(OFFLOAD, *FROZEN, "frozen.limit_mb=0.000001")
    del loads[:]
    train_client_0(prepared)
    assert loads[:2] == [{0, 1}, {2, 3}]
    assert loads[2:4] == [{0, 1, 2, 3}, {2, 3}]
    assert loads[-1] == {2, 3}


def test_frozen_layers_stay_in_memory_if_they_run_in_every_step(
    prepare_with: Callable[..., Prepared], loads: list[set[int]]
) -> None:
    overrides = ("frozen.layers=1", "frozen.cache=false", "dropout.every=round")
    _, update = train_client_0(prepare_with(OFFLOAD, *overrides))
    ran = {layer for layer, steps in enumerate(update.active_steps) if steps}
    assert loads[-1] == {0, *ran}


def test_measuring_loads_every_layer(
    prepare_with: Callable[..., Prepared], loads: list[set[int]]
) -> None:
    prepared = prepare_with(OFFLOAD, *ROUND)
    del loads[:]
    train_client_0(prepared, reward_rows=4)
    assert loads[0] == loads[-1] == {0, 1, 2, 3}


def test_a_base_delta_is_added_to_weights_in_memory(
    prepare_with: Callable[..., Prepared], loads: list[set[int]]
) -> None:
    prepared = prepare_with(OFFLOAD, *ROUND)
    del loads[:]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    train_client_0(prepared, base_delta=BaseDelta("v1", {name: np.ones((32, 32), np.float32)}))
    assert loads[0] == {0, 1, 2, 3}


def test_a_new_adapter_is_moved_to_the_device(
    prepare_with: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    client_model = prepare_with(OFFLOAD, *ROUND).model
    brought: list[int] = []

    def copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        brought.append(values.data_ptr())
        return values

    monkeypatch.setattr("droppeft.models.offloading._copied", copied)
    spec = AdapterSpec((LayerAdapter("lora", 3),) * client_model.num_layers, alpha=3.0)
    client_model.attach(spec)
    addresses = {
        value.data_ptr() for named in client_model.parameters.values() for value in named.values()
    }
    assert addresses <= set(brought)


def test_a_base_delta_is_not_lost_by_offloading(prepare_with: Callable[..., Prepared]) -> None:
    """It changes layers that no step runs, and that are loaded again to measure the reward."""
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    values = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    delta = BaseDelta("v1", {name: values})
    found = []
    for overrides in ((), (OFFLOAD,)):
        prepared = prepare_with(*FROZEN, *overrides)
        updates = [
            train_client_0(prepared, base_delta=d, reward_rows=8)[1] for d in (delta, None, delta)
        ]
        found.append([(update.train_loss, update.reward) for update in updates])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
