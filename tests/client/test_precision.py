"""Runs in half precision and with gradient checkpointing."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from droppeft.adapters.by_layer import get_tensors, set_tensors
from droppeft.client.run_inputs import clients_of
from droppeft.client.trial_step import try_one_step
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.federated_method import local_training
from droppeft.layer_dropout.modes import Mode
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Update
from droppeft.messages.tensors import flatten
from droppeft.models import precision
from droppeft.models.precision import DTYPES
from droppeft.server.prepare import Prepared
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.server.validation import why_refused
from droppeft.tasks.registry import task_named
from droppeft.training.loop import Step, train
from runs import Recorder, adapter_bytes, rows_of

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


def test_a_model_is_merged_with_the_values_that_were_trained_on(
    prepare_with: Callable[..., Prepared],
) -> None:
    """Adapters whose frozen parts come from an SVD of the weights fit to no others."""
    config = prepare_with("training.precision=bf16").config
    held, merged = (
        task_named(config.task).load_backbone(config, ("a", "b"), 0, dequantised=exact).model
        for exact in (False, True)
    )
    for one, other in zip(held.parameters(), merged.parameters(), strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one.float(), other)


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


# What a step computes with


class CastsOf(TorchDispatchMode):
    """Counts the casts of some tensors."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = {value.untyped_storage().data_ptr() for value in tensors}
        self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.casts += args[0].untyped_storage().data_ptr() in self.known
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_frozen_weights_are_held_once_and_never_cast(
    prepare_with: Callable[..., Prepared], precision: str
) -> None:
    """Only what is trained is in fp32, and what it replaces; autocast casts none of the rest."""
    prepared = prepare_with(f"training.precision={precision}", "dropout.mean=0")
    model = prepared.model
    trained = {id(value) for named in model.parameters.values() for value in named.values()}
    frozen = {
        name: value
        for name, value in model.model.named_parameters()
        if id(value) not in trained and ".original_module." not in name
    }
    assert {value.dtype for value in frozen.values()} == {DTYPES[precision]}
    assert {value.dtype for value in model.model.parameters() if id(value) in trained} == {
        torch.float32
    }
    clients = clients_of(prepared.loaded)
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [0])
    with CastsOf(frozen.values()) as counted:
        clients[0].train(instruction)
    assert counted.casts == 0


def test_the_hash_of_a_model_does_not_depend_on_the_precision(
    prepare_with: Callable[..., Prepared],
) -> None:
    found = {
        prepare_with(f"training.precision={one}").loaded.backbone.weights_hash
        for one in ("fp32", "bf16", "fp16")
    }
    assert len(found) == 1


@pytest.mark.sample("True")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_and_head_are_in_training_mode(
    prepare_with: Callable[..., Prepared], checkpointing: bool
) -> None:
    """The tiny model drops a tenth of its values where its backbone is in training mode."""

    def losses(*overrides: str) -> set[float]:
        prepared = prepare_with("dropout.mean=0", *overrides)
        model, settings = prepared.model, local_training(prepared.config)
        model.attach(prepared.state.model.adapter)
        for name, value in model.model.named_parameters():
            if ".lora_B." in name:
                value.data.fill_(0.1)  # at 0, dropout in front of A would change nothing
        head_dropout: Any = model.model.get_submodule("base_model.model.dropout")
        head_dropout.p = 0.0
        batch = model.task.collate(prepared.test, np.arange(4))
        step, found = Step([batch], (Mode.TRAIN,) * model.num_layers, rate_factor=0.0), set()
        for seed in range(2):
            torch.manual_seed(seed)
            found.add(train(model.trainable(model.parameters), [step], settings).loss)
        return found

    recomputing = f"training.checkpointing={str(checkpointing).lower()}"
    assert len(losses(recomputing)) == 1
    assert len(losses(recomputing, "adapter.dropout=0.3")) == 2
    assert len(losses(recomputing, "training.backbone_dropout=true")) == 2


# Rehearsals: what a model and an adapter cannot be trained with is found before the run


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_adapter_that_fails_under_autocast_is_refused_before_anything_is_written(
    tiny_overrides: list[str], tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("value cannot be converted")

    monkeypatch.setattr("droppeft.client.trial_step.train", fail)
    config = [*tiny_overrides, "adapter.type=vera", f"training.precision={precision}"]
    with pytest.raises(DroppeftError) as caught:
        start_run(load_config(None, config), tmp_path / "run", Recorder())
    assert str(caught.value).startswith(
        f"adapter.type=vera on this model cannot be trained with training.precision={precision} "
        "and training.checkpointing=false (value cannot be converted)"
    )
    assert not list(tmp_path.iterdir())


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
    monkeypatch.setattr("droppeft.client.trial_step.train", lambda *args: taken.append(args))
    prepare_with(*overrides)
    assert len(taken) == steps
