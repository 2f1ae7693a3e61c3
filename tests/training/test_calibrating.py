"""What each layer is worth, measured, against the same computed directly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chats import chat_settings
from droppeft.adapters.by_layer import get_tensors
from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import tokens_of
from droppeft.data.tokens import TokenRows
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec, local_training
from droppeft.layer_dropout import gated
from droppeft.messages.instruction import AdapterSpec, LocalTraining
from droppeft.training.calibrating import NOT_FINITE, added_losses, calibrate
from droppeft.training.loop import Trainable, evaluate
from handmade import assert_same
from runs import prepared_run

LAYERS = 4
ROWS = 24


@dataclass(frozen=True)
class Ready:
    """A model with a fresh adapter in every layer, and rows."""

    model: ClientModel
    spec: AdapterSpec
    table: TokenRows
    settings: LocalTraining

    @property
    def on(self) -> Trainable:
        self.model.attach(self.spec)
        return self.model.trainable(self.model.parameters)

    def loss(self, active: Sequence[bool]) -> float:
        """The loss of all rows with some layers, in one batch."""
        on = self.on
        with gated(on.blocks) as gates:
            gates.active = active
            return evaluate(on.model, self.table, np.arange(ROWS), on.task, ROWS).loss


def ready_with(overrides: list[str], rows: int = ROWS) -> Ready:
    loaded = prepared_run(
        *overrides, "training.batch_size=14", "training.micro_batch_size=7"
    ).loaded
    config, model = loaded.config, loaded.model
    table = tokens_of(loaded, loaded.data.train.take(np.arange(rows)))
    return Ready(model, adapter_spec(config.adapter, LAYERS), table, local_training(config))


@pytest.fixture
def chat(tmp_path: Path) -> Ready:
    """A language model, whose rows have targets of different number."""
    return ready_with([*chat_settings(tmp_path), "training.precision=fp32"])


@pytest.fixture(params=["classification", "causal_lm"])
def ready(request: pytest.FixtureRequest, tiny_overrides: list[str]) -> Ready:
    if request.param == "causal_lm":
        found: Ready = request.getfixturevalue("chat")
        return found
    return ready_with(tiny_overrides)


def test_an_added_loss_is_the_difference_of_two_losses(ready: Ready) -> None:
    steps: list[tuple[int, int]] = []
    found = calibrate(
        ready.on,
        ready.table,
        np.arange(ROWS),
        ready.settings,
        fit_head=False,
        progress=lambda done, of: steps.append((done, of)),
    )
    full = ready.loss((True,) * LAYERS)
    assert found.loss == pytest.approx(full, rel=1e-5)
    for layer, added in enumerate(found.added_loss):
        without = ready.loss([other != layer for other in range(LAYERS)])
        assert added == pytest.approx(without - full, abs=2e-6)
        assert added != 0
    assert min(found.added_loss_error) > 0
    assert (found.rows, found.head_rows) == (ROWS, 0)
    assert found.tokens == ready.table.lengths.sum()
    passes = 4 * (LAYERS + 2)  # four batches
    assert steps == [(done, passes) for done in range(passes + 1)]


def test_gradients_are_those_of_the_mean_loss(ready: Ready) -> None:
    rows = np.arange(ROWS)
    found = calibrate(ready.on, ready.table, rows, ready.settings, fit_head=False)
    on = ready.on
    assert all(value.grad is None for value in on.values)
    outputs: list[torch.Tensor] = []

    def keep(block: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states.retain_grad()
        outputs.append(states)

    hooks = [block.register_forward_hook(keep) for block in on.blocks]
    on.task.loss(on.model.eval(), on.task.collate(ready.table, rows)).backward()
    for hook in hooks:
        hook.remove()
    for layer in range(LAYERS):
        values = on.parameters[layer].values()
        l1 = sum(float(value.grad.abs().sum()) for value in values if value.grad is not None)
        assert found.gradient[layer] == pytest.approx(l1, rel=1e-3)
        state = outputs[layer].grad
        assert state is not None
        assert found.state_gradient[layer] == pytest.approx(float(state.norm()), rel=1e-3)
        assert found.gradient[layer] > 0


def test_a_layer_that_changes_nothing_adds_no_loss(chat: Ready) -> None:
    """Without what attention and MLP write into the hidden states."""
    on = chat.on
    with torch.no_grad():
        for name, value in on.model.named_parameters():
            if ".2." in name and ("o_proj" in name or "down_proj" in name):
                value.zero_()
    found = calibrate(on, chat.table, np.arange(ROWS), chat.settings, fit_head=False)
    assert (found.added_loss[2], found.added_loss_error[2]) == (0, 0)
    assert 0 not in (found.added_loss[1], found.added_loss[3])


def test_a_new_head_is_trained_on_other_rows_and_forgotten(tiny_overrides: list[str]) -> None:
    ready = ready_with(tiny_overrides, rows=120)
    found = ready.model.calibrate(ready.spec, ready.table, ready.settings)
    assert (found.rows, found.head_rows, found.targets) == (60, 60, 60)
    assert found.loss < math.log(3) - 0.003  # the states of a random model tell little
    assert_same(get_tensors(ready.model.parameters), ready.model.fresh_tensors(ready.spec))
    again = ready.model.calibrate(ready.spec, ready.table, ready.settings)
    assert (again.added_loss, again.gradient) == (found.added_loss, found.gradient)


def test_a_trained_head_is_used_as_it_is(tiny_overrides: list[str], tmp_path: Path) -> None:
    """The tiny model was saved with a head for the classes 0 and 1."""
    rows = [f"{'bread' if row % 2 else 'moon'} {row},{row % 2}" for row in range(80)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    ready = ready_with([*tiny_overrides, f"data={tmp_path / 'data.csv'}"])
    found = ready.model.calibrate(ready.spec, ready.table, ready.settings)
    assert (found.rows, found.head_rows) == (ROWS, 0)


@pytest.mark.parametrize("extra", ["training.checkpointing=true", "training.precision=bf16"])
def test_settings_that_save_memory_change_rounding_alone(
    extra: str, tiny_overrides: list[str]
) -> None:
    plain, saving = ready_with(tiny_overrides), ready_with([*tiny_overrides, extra])
    one, other = (
        calibrate(ready.on, ready.table, np.arange(ROWS), ready.settings, fit_head=False)
        for ready in (plain, saving)
    )
    close = {"abs": 0.03} if "bf16" in extra else {"rel": 1e-4}
    assert one.added_loss == pytest.approx(other.added_loss, **close)
    assert one.gradient == pytest.approx(other.gradient, rel=0.1 if "bf16" in extra else 1e-4)


def test_the_standard_error_is_that_of_the_mean_over_rows() -> None:
    full, skipped = np.array([1.0, 2.0]), np.array([[2.0, 1.5], [4.0, 2.5]])
    added, error = added_losses(full, skipped, np.array([1.0, 1.0]))
    assert added.tolist() == [1.5, 0.5]
    assert error.tolist() == [0.5, 0.0]  # of 1 and 2, and of .5 twice
    skipped[0, 0] = math.inf
    added, error = added_losses(full, skipped, np.array([1.0, 1.0]))
    assert added.tolist() == [NOT_FINITE, 0.5]
    assert error.tolist() == [0, 0]


def test_too_few_rows_are_refused(tiny_overrides: list[str]) -> None:
    ready = ready_with(tiny_overrides)
    with pytest.raises(DroppeftError, match=r"^3 rows are too few to measure"):
        calibrate(ready.on, ready.table, np.arange(3), ready.settings, fit_head=True)
