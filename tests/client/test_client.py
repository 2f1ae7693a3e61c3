"""Local training of a client: what it reads, sends and leaves unchanged."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from droppeft.adapters.base_delta import base_delta_applied
from droppeft.adapters.by_layer import set_tensors
from droppeft.client.local_training import _drawn_modes
from droppeft.client.run_inputs import clients_of
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import Mode
from droppeft.messages.instruction import BaseDelta, Budget, Instruction, LayerDropout
from droppeft.messages.reply import Update
from droppeft.messages.tensors import flatten, restrict
from droppeft.seeds import seed_for
from droppeft.server.prepare import Prepared
from droppeft.training.loop import evaluate

pytestmark = pytest.mark.usefixtures("state")

# A weight that peft wraps because it has an adapter, and one that peft does not wrap.
WRAPPED = "bert.encoder.layer.0.attention.self.query.weight"
PLAIN = "bert.encoder.layer.2.output.dense.bias"


def train_client(prepared: Prepared, instruction: Instruction) -> Update:
    clients = clients_of(prepared.loaded)
    return clients[instruction.client].train(instruction)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: value.detach().numpy().tobytes()
        for name, value in model.named_parameters()
        if not value.requires_grad
    }


@pytest.fixture
def delta() -> BaseDelta:
    rng = np.random.default_rng(0)
    return BaseDelta(
        "v1",
        {
            WRAPPED: rng.normal(size=(32, 32)).astype(np.float32),
            PLAIN: rng.normal(size=32).astype(np.float32),
        },
    )


def logits(prepared: Prepared) -> torch.Tensor:
    client_model = prepared.model
    client_model.model.eval()
    batch = client_model.task.collate(prepared.test, np.arange(4))
    with torch.inference_mode():
        return client_model.task.logits(client_model.model, batch)


# The change of the backbone


@pytest.mark.parametrize("name", [WRAPPED, PLAIN])
def test_a_base_delta_is_in_force_only_inside_the_context(
    prepared: Prepared, delta: BaseDelta, name: str
) -> None:
    model = prepared.model.model
    alone = BaseDelta("v1", {name: delta.tensors[name]})
    before, plain = bits(model), logits(prepared)
    with base_delta_applied(model, alone):
        assert not torch.equal(logits(prepared), plain)
    assert bits(model) == before
    assert torch.equal(logits(prepared), plain)


def test_a_base_delta_is_undone_when_training_fails(prepared: Prepared, delta: BaseDelta) -> None:
    model = prepared.model.model
    before = bits(model)
    with pytest.raises(RuntimeError, match="lost"), base_delta_applied(model, delta):
        raise RuntimeError("lost")
    assert bits(model) == before


@pytest.mark.parametrize("tensors", [{"no.such": np.zeros(1)}, {PLAIN: np.zeros(31)}])
def test_a_base_delta_that_does_not_fit_changes_nothing(
    prepared: Prepared, delta: BaseDelta, tensors: dict[str, np.ndarray]
) -> None:
    model = prepared.model.model
    before = bits(model)
    wrong = BaseDelta("v2", {WRAPPED: delta.tensors[WRAPPED], **tensors})
    with (
        pytest.raises(DroppeftError, match=r"base delta v2: .* does not fit the backbone"),
        base_delta_applied(model, wrong),
    ):
        pytest.fail("it was applied")
    assert bits(model) == before


def test_with_a_base_delta_a_client_trains_on_the_changed_backbone(
    prepared: Prepared, instructions: list[Instruction], delta: BaseDelta
) -> None:
    before = bits(prepared.model.model)
    plain, changed = (
        train_client(prepared, replace(instructions[0], base_delta=d)) for d in (None, delta)
    )
    assert plain.train_loss != changed.train_loss
    assert bits(prepared.model.model) == before


# What a client sends


def test_an_update_says_what_was_done(prepared: Prepared, instructions: list[Instruction]) -> None:
    update = train_client(prepared, replace(instructions[0], budget=Budget(steps=3)))
    assert (update.steps, update.examples) == (3, 12)  # three batches of four rows
    assert update.reward is None
    # mean 0.25 over four layers, exact: one of the two inner layers is dropped in every step
    assert update.active_steps[0] == update.active_steps[3] == 3
    assert update.active_steps[1] + update.active_steps[2] == 3
    assert np.isfinite(update.train_loss)
    cost = update.cost
    assert cost.tokens >= 12 * 3
    assert cost.activation_bytes_peak > 0
    assert cost.reward_wall_s == 0.0
    assert 0 < cost.train_wall_s <= cost.total_wall_s


def test_an_epoch_uses_every_row_once(prepared: Prepared, instructions: list[Instruction]) -> None:
    update = train_client(prepared, replace(instructions[0], budget=Budget(epochs=1)))
    assert update.examples == len(prepared.loaded.clients[0].train)


def test_all_tensors_that_are_sent_were_trained(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    update = train_client(prepared, replace(instructions[0], dropout=None))
    sent = {name: array for _, name, array in flatten(instructions[0].tensors)}
    back = list(flatten(update.tensors))
    assert {name for _, name, _ in back} == instructions[0].share
    # LoRA's A has no gradient in the first step, since B is zero; in the second it moves.
    assert [name for _, name, array in back if np.array_equal(array, sent[name])] == []
    assert all(array.dtype == np.float32 for _, _, array in back)


def test_a_layer_that_never_ran_is_not_sent(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    dropout = LayerDropout((0.0, 1.0, 0.0, 0.0), "exact")
    update = train_client(prepared, replace(instructions[0], dropout=dropout))
    assert update.active_steps == (2, 0, 2, 2)
    assert update.importance[1] == 0.0
    assert set(update.tensors) == {0, 2, 3, "head"}


def test_only_what_may_travel_is_sent(prepared: Prepared, instructions: list[Instruction]) -> None:
    share = frozenset(instructions[0].tensors[3])
    update = train_client(prepared, replace(instructions[0], share=share, run="00c0ffee"))
    assert set(update.tensors) == {3}
    assert set(update.tensors[3]) == share


def test_an_instruction_that_lacks_a_tensor_is_refused(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    names = frozenset(name for _, name, _ in flatten(instructions[0].tensors))
    lacking = sorted(instructions[0].tensors[1])[0]
    instruction = replace(
        instructions[0], tensors=restrict(instructions[0].tensors, names - {lacking})
    )
    with pytest.raises(DroppeftError, match=r"round 1, client 0: the instruction lacks .*layer.1"):
        train_client(prepared, instruction)


def test_the_reward_is_the_decrease_of_the_validation_loss(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    client_model, rows = prepared.model, prepared.loaded.clients[0].validation[:3]
    assert len(rows) == 3
    update = train_client(prepared, replace(instructions[0], dropout=None, reward_rows=3))

    def loss(tensors: object) -> float:
        set_tensors(client_model.parameters, tensors)
        return evaluate(
            client_model.model, clients_of(prepared.loaded)[0].table, rows, client_model.task, 64
        ).loss

    assert update.reward == loss(instructions[0].tensors) - loss(update.tensors)
    assert update.reward != 0
    assert update.cost.reward_wall_s > 0


def test_tokens_of_the_reward_are_counted(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    table, rows = clients_of(prepared.loaded)[0].table, prepared.loaded.clients[0].validation[:3]
    update = train_client(prepared, replace(instructions[0], reward_rows=3))
    # Two forwards of one batch, padded to its longest row.
    assert update.cost.reward_tokens == 2 * 3 * table.lengths[rows].max()
    assert train_client(prepared, instructions[0]).cost.reward_tokens == 0


def test_tokens_are_counted_where_a_layer_ran(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    gates = LayerDropout((0.0, 1.0, 0.5, 0.0), "exact")
    update = train_client(prepared, replace(instructions[0], dropout=gates, budget=Budget(steps=9)))
    cost = update.cost
    assert cost.layer_tokens[:2] == (cost.tokens, 0)
    assert 0 < cost.layer_tokens[2] < cost.tokens
    assert cost.rows == update.examples
    full = train_client(prepared, replace(instructions[0], dropout=None)).cost
    assert full.layer_tokens == (full.tokens,) * 4


def test_measuring_the_reward_does_not_change_training(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    one, other = (
        train_client(prepared, replace(instructions[0], reward_rows=rows)) for rows in (0, 3)
    )
    for (_, name, left), (_, _, right) in zip(
        flatten(one.tensors), flatten(other.tensors), strict=True
    ):
        np.testing.assert_array_equal(left, right, err_msg=name)


# Randomness


def test_training_neither_reads_nor_changes_the_global_generator(
    prepare_with: Callable[..., Prepared],
) -> None:
    prepared = prepare_with("adapter.dropout=0.5")
    instruction = prepared.method.instruct(prepared.setup, prepared.state, 1, [2])[0]
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        losses.append(train_client(prepared, instruction).train_loss)
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]


def test_every_draw_depends_on_seed_round_and_client(
    prepared: Prepared, instructions: list[Instruction], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def recorded(seed: int, **about: Any) -> int:
        drawn.append((seed, about["purpose"], about["round"], about["client"]))
        return seed_for(seed, **about)

    instruction = replace(instructions[1], round=2, seed=7)
    with monkeypatch.context() as patch:
        patch.setattr("droppeft.seeds.seed_for", recorded)
        train_client(prepared, instruction)
    purposes = ("batches", "starts", "gates", "modules")
    assert set(drawn) == {(7, purpose, 2, 1) for purpose in purposes}


@pytest.mark.parametrize(
    ("every", "held"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4]), (None, [0, 0, 0, 0, 0])]
)
def test_a_draw_holds_for_as_many_steps_as_the_instruction_says(
    prepared: Prepared, instructions: list[Instruction], every: int | None, held: list[int]
) -> None:
    dropout = LayerDropout((0.0, 0.5, 0.5, 0.0), "bernoulli", every)
    instruction = replace(instructions[1], dropout=dropout, seed=11)
    prepared.model.attach(instruction.adapter)
    alone = replace(instruction, dropout=replace(dropout, every=1))

    drawn, fresh = (_drawn_modes(prepared.model.parameters, one, 5) for one in (instruction, alone))
    assert drawn == [fresh[step] for step in held]
    assert len(set(fresh)) > 1


def test_the_start_of_a_step_is_drawn_apart_from_what_it_skips(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    """A run with one start, or without layer dropout, has the same draws as one with both."""
    both = replace(instructions[0], starts=(2, 0))
    drawn, one_start, unskipped = (
        _drawn_modes(prepared.model.parameters, one, 12)
        for one in (both, instructions[0], replace(both, dropout=None))
    )
    for step, modes in enumerate(drawn):
        assert [m is Mode.SKIP for m in modes] == [m is Mode.SKIP for m in one_start[step]]
        for mode, plain in zip(modes, unskipped[step], strict=True):
            assert mode in (plain, Mode.SKIP)
    assert {modes.index(Mode.TRAIN) for modes in unskipped} == {0, 2}


@pytest.mark.parametrize("change", [{"seed": 1}, {"round": 2}])
def test_another_seed_or_round_gives_other_draws(
    prepared: Prepared, instructions: list[Instruction], change: dict[str, int]
) -> None:
    one, other = (
        train_client(prepared, instructions[0]),
        train_client(prepared, replace(instructions[0], **change)),
    )
    assert one.train_loss != other.train_loss


# What local training leaves unchanged


def frozen_a(instruction: Instruction) -> Instruction:
    """FFA-LoRA: only B and the head are trained and travel; A follows from the seed."""
    trained = frozenset(name for name in instruction.share if ".lora_A." not in name)
    return replace(
        instruction, train=trained, share=trained, tensors=restrict(instruction.tensors, trained)
    )


def test_frozen_tensors_stay_as_the_seed_made_them(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    client_model = prepared.model
    train_client(
        prepared, replace(instructions[1], dropout=None)
    )  # leaves its A in the client model
    instruction = frozen_a(replace(instructions[0], dropout=None))
    update = train_client(prepared, instruction)
    assert {name for _, name, _ in flatten(update.tensors)} == instruction.share
    fresh = {
        name: array for _, name, array in flatten(client_model.fresh_tensors(instruction.adapter))
    }
    for named in client_model.parameters.values():
        for name, value in named.items():
            moved = not np.array_equal(value.detach().numpy(), fresh[name])
            assert moved == (name in instruction.share), name


def test_what_was_frozen_is_trained_again_in_the_next_local_training(
    prepared: Prepared, instructions: list[Instruction]
) -> None:
    instruction = replace(instructions[0], dropout=None)
    alone = train_client(prepared, instruction)
    train_client(prepared, frozen_a(instruction))
    after = train_client(prepared, instruction)
    for (_, name, one), (_, _, other) in zip(
        flatten(alone.tensors), flatten(after.tensors), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=name)
