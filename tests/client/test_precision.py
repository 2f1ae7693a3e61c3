"""Runs in half precision and with gradient checkpointing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from droppeft.adapters.by_layer import get_tensors, set_tensors
from droppeft.client.client import try_one_step
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.federated_method import local_training
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Update
from droppeft.messages.tensors import flatten
from droppeft.models import precision
from droppeft.server.prepare import Prepared
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.server.validation import why_refused
from droppeft.tasks.registry import task_named
from runs import Recorder, adapter_bytes, rows_of
from tiny import save_tiny_model

FP16 = ("training.precision=fp16", "training.checkpointing=true")


def train_client_0(prepared: Prepared) -> tuple[Instruction, Update]:
    clients = clients_of(prepared.loaded)
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    return instruction, clients[0].train(instruction)


@pytest.mark.parametrize("further", [(), ("frozen.layers=1",)])
def test_checkpointing_sends_the_same_update_from_less_memory(
    prepare_with: Callable[..., Prepared], further: tuple[str, ...]
) -> None:
    overrides = ("adapter.dropout=0.2", "training.precision=bf16", "dropout.mean=0", *further)
    _, plain = train_client_0(prepare_with(*overrides))
    _, lean = train_client_0(prepare_with(*overrides, "training.checkpointing=true"))
    for (_, name, one), (_, _, other) in zip(
        flatten(plain.tensors), flatten(lean.tensors), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert lean.train_loss == plain.train_loss
    assert lean.importance == plain.importance
    assert lean.cost.activation_bytes_peak < 0.6 * plain.cost.activation_bytes_peak


def test_a_resumed_run_in_fp16_leaves_the_same_adapter(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    start_run(load_config(None, [*tiny_overrides, *FP16]), whole, Recorder())
    shutil.copytree(whole, again)
    sorted((again / "checkpoints").iterdir())[-1].unlink()
    (again / "result.json").unlink()
    shutil.rmtree(again / "adapter")
    resume_run(again, Recorder())
    assert adapter_bytes(again) == adapter_bytes(whole)
    rows = rows_of(whole / "rounds.jsonl")
    assert all(row["failures"] == [] for row in rows)
    assert rows[-1]["global_loss"] != rows[0]["global_loss"]


def test_a_client_of_which_every_step_overflowed_is_a_failure_and_the_run_continues(
    prepare_with: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_with(*FP16)
    monkeypatch.setattr(precision, "INITIAL_SCALE", 2.0**100)
    instruction, update = train_client_0(prepared)
    layout = prepared.model.layout(instruction.adapter)
    assert why_refused(instruction, update, layout, task_named("classification")) == (
        "trained on nothing: in every step fp16 overflowed; use training.precision=bf16"
    )


def test_some_skipped_steps_are_no_failure(
    prepare_with: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_with(*FP16, "training.local_steps=3")
    monkeypatch.setattr(precision, "INITIAL_SCALE", 2.0**30)
    monkeypatch.setattr(precision, "BACKOFF", 2.0**-20)
    instruction, update = train_client_0(prepared)
    assert (update.steps, update.examples, update.cost.rows) == (3, 8, 12)
    assert max(update.active_steps) == 2
    layout = prepared.model.layout(instruction.adapter)
    assert why_refused(instruction, update, layout, task_named("classification")) is None


# Rehearsals: what a model and an adapter cannot be trained with is found before the run


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_adapter_that_fails_under_autocast_is_refused_before_anything_is_written(
    tiny_overrides: list[str], tmp_path: Path, precision: str
) -> None:
    model = save_tiny_model(tmp_path / "model", 2, "deberta-v2")
    overrides = ["dropout.mean=0", "adapter.type=vera", "adapter.rank=4"]
    config = [*tiny_overrides, f"model={model}", *overrides, f"training.precision={precision}"]
    with pytest.raises(DroppeftError) as caught:
        start_run(load_config(None, config), tmp_path / "run", Recorder())
    assert str(caught.value).startswith(
        f"adapter.type=vera on this model cannot be trained with training.precision={precision} "
        "and training.checkpointing=false (value cannot be converted"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("overrides", [FP16, ("training.precision=bf16",)])
def test_a_rehearsal_changes_no_value(
    prepare_with: Callable[..., Prepared], overrides: tuple[str, ...]
) -> None:
    prepared = prepare_with(*overrides)
    client_model, spec = prepared.model, prepared.state.model.adapter
    rng = np.random.default_rng(0)
    values = {
        key: {name: rng.normal(size=one.shape).astype(np.float32) for name, one in named.items()}
        for key, named in prepared.state.model.tensors.items()
    }
    set_tensors(client_model.parameters, values)
    state = torch.get_rng_state()
    try_one_step(client_model, prepared.test, local_training(prepared.config), spec)
    for (_, name, one), (_, _, other) in zip(
        flatten(values), flatten(get_tensors(client_model.parameters)), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [((), 0), (("training.precision=fp16",), 1), (("training.checkpointing=true",), 1)],
)
def test_settings_that_every_model_supports_are_not_rehearsed(
    prepare_with: Callable[..., Prepared],
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    steps: int,
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("droppeft.client.client.train", lambda *args: taken.append(args))
    prepare_with(*overrides)
    assert len(taken) == steps
