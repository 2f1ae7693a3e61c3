"""Runs with weights in a file: the bits of runs without, and what is held when."""

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
from droppeft.messages import AdapterSpec, BaseDelta, LayerAdapter
from droppeft.models.offloading import OffloadedWeights
from droppeft.server.prepare import Prepared
from droppeft.server.run import start_run
from runs import Recorder, adapter_bytes, rows_of, timeless

OFFLOAD = "training.offload=true"
ROUND = ("dropout.every=round", "dropout.mean=0.5")
FROZEN = ("frozen.layers=2", "dropout.mean=0.25", "dropout.protect_first=0")


def run(words: list[str], out: Path, *more: str) -> tuple[dict[str, bytes], list[Any]]:
    start_run(load_config(None, [*words, *more]), out, Recorder())
    return adapter_bytes(out), [timeless(row) for row in rows_of(out / "clients.jsonl")]


@pytest.mark.parametrize("more", [ROUND, FROZEN, (*FROZEN, *ROUND[:1])], ids=" ".join)
def test_adapter_and_rows_are_those_without(
    more: tuple[str, ...], tiny_words: list[str], tmp_path: Path
) -> None:
    plain = run(tiny_words, tmp_path / "plain", *more)
    assert run(tiny_words, tmp_path / "offloaded", *more, OFFLOAD) == plain


@pytest.mark.parametrize("limit", ["0.002", "0.000001"])
def test_the_adapter_is_the_same_when_the_disk_holds_too_few_states(
    limit: str, tiny_words: list[str], tmp_path: Path
) -> None:
    small = (*FROZEN, f"frozen.limit_mb={limit}")
    plain, _ = run(tiny_words, tmp_path / "plain", *FROZEN)
    assert run(tiny_words, tmp_path / "offloaded", *small, OFFLOAD)[0] == plain


def turn(prepared: Prepared, **changes: Any) -> Any:
    clients = clients_of(prepared.loaded)
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    instruction = replace(instruction, **changes)
    return instruction, clients[0].train(instruction)


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """What is held, in order; a prefix that runs without being held fails."""
    found: list[set[int]] = [set()]
    hold, states = OffloadedWeights.hold, FrozenLayers.states

    def noting(self: OffloadedWeights, layers: Collection[int]) -> None:
        found.append(set(layers))
        hold(self, layers)

    def checking(self: FrozenLayers, inputs: Any) -> Any:
        assert set(range(self.depth)) <= found[-1]
        return states(self, inputs)

    monkeypatch.setattr(OffloadedWeights, "hold", noting)
    monkeypatch.setattr(FrozenLayers, "states", checking)
    return found


def test_a_turn_holds_the_layers_that_it_runs(
    prepare_with: Callable[..., Prepared], holds: list[set[int]]
) -> None:
    _, update = turn(prepare_with(OFFLOAD, *ROUND))
    ran = {layer for layer, steps in enumerate(update.active_steps) if steps}
    assert len(ran) == 2
    assert holds[-1] == ran


def test_a_turn_makes_its_states_before_it_holds_the_layers_behind(
    prepare_with: Callable[..., Prepared], holds: list[set[int]]
) -> None:
    prepared = prepare_with(OFFLOAD, *FROZEN)
    del holds[:]
    turn(prepared)
    assert holds == [{0, 1}, {2, 3}]


def test_states_that_do_not_fit_bring_the_prefix_back_for_a_moment(
    prepare_with: Callable[..., Prepared], holds: list[set[int]]
) -> None:
    prepared = prepare_with(OFFLOAD, *FROZEN, "frozen.limit_mb=0.000001")
    del holds[:]
    turn(prepared)
    assert holds[:2] == [{0, 1}, {2, 3}]
    assert holds[2:4] == [{0, 1, 2, 3}, {2, 3}]
    assert holds[-1] == {2, 3}


def test_the_first_layers_are_held_where_they_run_in_every_step(
    prepare_with: Callable[..., Prepared], holds: list[set[int]]
) -> None:
    words = ("frozen.layers=1", "frozen.cache=false", "dropout.every=round")
    _, update = turn(prepare_with(OFFLOAD, *words))
    ran = {layer for layer, steps in enumerate(update.active_steps) if steps}
    assert holds[-1] == {0, *ran}


def test_measuring_holds_every_layer(
    prepare_with: Callable[..., Prepared], holds: list[set[int]]
) -> None:
    prepared = prepare_with(OFFLOAD, *ROUND)
    del holds[:]
    turn(prepared, reward_rows=4)
    assert holds[0] == holds[-1] == {0, 1, 2, 3}


def test_a_base_delta_is_added_where_the_weights_are_used(
    prepare_with: Callable[..., Prepared], holds: list[set[int]]
) -> None:
    prepared = prepare_with(OFFLOAD, *ROUND)
    del holds[:]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    turn(prepared, base_delta=BaseDelta("v1", {name: np.ones((32, 32), np.float32)}))
    assert holds[0] == {0, 1, 2, 3}


def test_a_new_adapter_is_brought_to_the_client(
    prepare_with: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = prepare_with(OFFLOAD, *ROUND).bench
    brought: list[int] = []

    def copied(values: torch.Tensor, client: torch.device) -> torch.Tensor:
        brought.append(values.data_ptr())
        return values

    monkeypatch.setattr("droppeft.models.offloading._copied", copied)
    spec = AdapterSpec((LayerAdapter("lora", 3),) * bench.num_layers, alpha=3.0)
    bench.attach(spec)
    own = {value.data_ptr() for named in bench.parameters.values() for value in named.values()}
    assert own <= set(brought)


def test_a_base_delta_is_not_lost(prepare_with: Callable[..., Prepared]) -> None:
    """It is in layers that the steps do not run, and that measuring reads again."""
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    values = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    delta = BaseDelta("v1", {name: values})
    found = []
    for words in ((), (OFFLOAD,)):
        prepared = prepare_with(*FROZEN, *words)
        turns = [turn(prepared, base_delta=d, reward_rows=8)[1] for d in (delta, None, delta)]
        found.append([(update.train_loss, update.reward) for update in turns])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
