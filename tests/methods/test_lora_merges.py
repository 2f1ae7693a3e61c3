"""Methods that merge LoRA as a product: the global model, by hand and with a model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from droppeft.adapters.by_layer import get_tensors, set_tensors
from droppeft.client.client import base_delta_applied
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Update
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import flatten
from droppeft.methods import METHODS
from droppeft.methods.plain_lora import with_added
from droppeft.server.prepare import Prepared, prepare
from droppeft.sharing.factors import pairs_of
from handmade import WIDTH_OF_MODEL, assert_same, shaped, update_for
from runs import update_of
from tiny import save_tiny_model

pytestmark = pytest.mark.usefixtures("state")

RUN = "00c0ffee"
EXACT = ("flora", "fedex_lora")


def changes(model: GlobalModel, scale: float) -> dict[str, Any]:
    """By name of A: the change of its weight by the model's LoRA and base delta together."""
    found = {}
    for key, a, b in pairs_of(model.tensors):
        named = model.tensors[key]
        found[a] = scale * named[b].astype(np.float64) @ named[a].astype(np.float64)
    added = dict(model.base_delta.tensors) if model.base_delta else {}
    for a in found:
        weight = a.removeprefix("base_model.model.").partition(".lora_A.")[0] + ".weight"
        found[a] = found[a] + added.pop(weight, 0.0)
    assert not added
    return found


def with_factors(instruction: Instruction, rng: np.random.Generator, examples: int) -> Update:
    """An update of random values."""
    tensors = {
        key: {name: rng.normal(size=array.shape).astype(np.float32) for name, array in v.items()}
        for key, v in instruction.tensors.items()
    }
    return update_for(instruction, examples=examples, tensors=tensors)


@pytest.mark.parametrize("name", EXACT)
def test_the_global_model_is_the_mean_of_the_clients_over_several_rounds(name: str) -> None:
    """Three rounds; the clients' changes have the weights 1 and 3, exactly."""
    setup, method = shaped(f"method={name}", "adapter.rank=2", "adapter.alpha=4"), METHODS[name]
    state, rng = method.init(setup), np.random.default_rng(0)
    for round in (1, 2, 3):
        instructions = method.instruct(setup, state, round, [0, 1])
        updates = [
            with_factors(instruction, rng, n)
            for instruction, n in zip(instructions, (10, 30), strict=True)
        ]
        expected = [
            changes(
                GlobalModel(instruction.adapter, update.tensors, instruction.base_delta), scale=2.0
            )
            for instruction, update in zip(instructions, updates, strict=True)
        ]
        state = method.merge(setup, state, instructions, updates)
        for a, merged in changes(state.model, scale=2.0).items():
            np.testing.assert_allclose(
                merged, expected[0][a] / 4 + expected[1][a] * 3 / 4, atol=1e-5
            )
        heads = [float(update.tensors["head"]["head.W"][0]) for update in updates]
        merged_head = float(state.model.tensors["head"]["head.W"][0])
        assert merged_head == pytest.approx(heads[0] / 4 + heads[1] * 3 / 4)


def test_averaging_the_factors_is_not_exact() -> None:
    setup = shaped("method=fedlora", "adapter.rank=2", "adapter.alpha=4")
    method = METHODS["fedlora"]
    state, rng = method.init(setup), np.random.default_rng(0)
    instructions = method.instruct(setup, state, 1, [0, 1])
    updates = [with_factors(instruction, rng, 10) for instruction in instructions]
    merged = changes(method.merge(setup, state, instructions, updates).model, scale=2.0)
    expected = [changes(replace(state.model, tensors=update.tensors), 2.0) for update in updates]
    assert all(
        np.abs(merged[a] - (expected[0][a] + expected[1][a]) / 2).max() > 0.1 for a in merged
    )


def test_flora_begins_each_round_with_fresh_factors_that_change_nothing() -> None:
    setup, method = shaped("method=flora", "adapter.rank=2"), METHODS["flora"]
    state, seen = method.init(setup), []
    for round in (1, 2, 3):
        instructions = method.instruct(setup, state, round, [0])
        state = method.merge(
            setup,
            state,
            instructions,
            [update_for(instruction, 1.0) for instruction in instructions],
        )
        named = state.model.tensors[0]
        assert not named["0.lora_B.weight"].any()
        assert np.abs(named["0.lora_A.weight"]).max() <= 1 / np.sqrt(WIDTH_OF_MODEL)
        seen.append(named["0.lora_A.weight"].tobytes())
    assert len(set(seen)) == 3
    again = method.init(setup)
    for round in (1, 2):
        instructions = method.instruct(setup, again, round, [0])
        again = method.merge(
            setup,
            again,
            instructions,
            [update_for(instruction, 1.0) for instruction in instructions],
        )
    assert again.model.tensors[0]["0.lora_A.weight"].tobytes() == seen[1]


def test_the_version_of_a_base_delta_follows_from_its_content() -> None:
    product = {"base_model.model.enc.q.lora_A.default.weight": np.ones((2, 2))}
    one, two = (with_added(None, product.items(), 0.5) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.version == two.version
    assert list(one.tensors) == ["enc.q.weight"]
    np.testing.assert_array_equal(one.tensors["enc.q.weight"], np.full((2, 2), 0.5, np.float32))
    more = with_added(one, product.items(), 0.5)
    assert more is not None
    assert more.version != one.version
    assert with_added(one, [], 0.5) is one


def ones_like(tensors: Any) -> Any:
    return {k: {n: np.ones_like(a) for n, a in named.items()} for k, named in tensors.items()}


# On a model


@pytest.fixture
def prepare_with(tiny_overrides: list[str]) -> Callable[..., Prepared]:
    plain = [override for override in tiny_overrides if not override.startswith("dropout.")]
    return lambda *overrides: prepare(
        load_config(None, [*plain, *overrides]), lambda step: None, RUN
    )


def logits(prepared: Prepared, model: GlobalModel | Update, delta: Any = None) -> torch.Tensor:
    client_model = prepared.model
    set_tensors(client_model.parameters, model.tensors)
    client_model.model.eval()
    batch = client_model.task.collate(prepared.test, np.arange(6))
    with torch.inference_mode(), base_delta_applied(client_model.model, delta):
        return client_model.task.logits(client_model.model, batch)


@pytest.mark.sample("*-bert")
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", EXACT)
def test_with_one_client_its_model_becomes_the_global_one(
    name: str, architecture: str, prepare_with: Callable[..., Prepared], tmp_path: Any
) -> None:
    """Two rounds, since the second has a base delta. GPT-2 stores weights as (in, out)."""
    model = save_tiny_model(tmp_path / "model", 4, architecture)
    prepared = prepare_with(
        f"method={name}", f"model={model}", "training.learning_rate=0.02", "training.local_steps=3"
    )
    clients, state = clients_of(prepared.loaded), prepared.state
    for round in (1, 2):
        [instruction] = prepared.method.instruct(prepared.setup, state, round, [1])
        update = update_of(clients, instruction)
        trained = logits(prepared, update, instruction.base_delta)
        state = prepared.method.merge(prepared.setup, state, [instruction], [update])
        merged = logits(prepared, state.model, state.model.base_delta)
        if name == "flora":  # all that was learnt is in the base delta
            alone = logits(prepared, state.model)
            assert not torch.allclose(alone, trained, atol=1e-3)
        torch.testing.assert_close(merged, trained, atol=2e-5, rtol=1e-4)


def test_ffa_computes_a_from_the_seed_and_does_not_send_it(
    prepare_with: Callable[..., Prepared],
) -> None:
    prepared = prepare_with("method=ffa_lora", "training.learning_rate=0.02")
    [instruction] = prepared.method.instruct(prepared.setup, prepared.state, 1, [1])
    sent = {name for _, name, _ in flatten(instruction.tensors)}
    assert sent == instruction.train == instruction.share
    assert not any(".lora_A." in name for name in sent)
    assert any(".lora_B." in name for name in sent)
    set_tensors(prepared.model.parameters, ones_like(prepared.state.model.tensors))
    reply = update_of(clients_of(prepared.loaded), instruction)
    assert prepared.method.evaluate_client(prepared.setup, prepared.state, 1, 1).train == sent
    assert {name for _, name, _ in flatten(reply.tensors)} == sent
    state = prepared.method.merge(prepared.setup, prepared.state, [instruction], [reply])
    for key, name, array in flatten(state.model.tensors):
        started = prepared.state.model.tensors[key][name]
        assert np.array_equal(array, started) == (".lora_A." in name)
    attached = {name: value for _, name, value in flatten(get_tensors(prepared.model.parameters))}
    for _, name, array in flatten(prepared.state.model.tensors):
        if ".lora_A." in name:
            np.testing.assert_array_equal(attached[name], array)


# FlexLoRA

MIXED = ("clock.profiles=jetson_tx2,jetson_agx_xavier", "method=flexlora", "adapter.rank=3")


def test_flexlora_sends_every_client_the_largest_components_that_its_rank_holds() -> None:
    setup, method = shaped(*MIXED, "adapter.alpha=6"), METHODS["flexlora"]
    state, rng = method.init(setup), np.random.default_rng(0)
    ranks: Any = state.memory.ranks
    slow, fast = ranks.index(min(ranks)), ranks.index(max(ranks))
    assert (ranks[slow], ranks[fast]) == (1, 3)
    instructions = method.instruct(setup, state, 1, [slow, fast])
    updates = [
        with_factors(instruction, rng, n)
        for instruction, n in zip(instructions, (10, 30), strict=True)
    ]
    firsts = [update.tensors[0] for update in updates]
    one, other = (named["0.lora_B.weight"] @ named["0.lora_A.weight"] for named in firsts)
    mean = one / 4 + other * 3 / 4
    state = method.merge(setup, state, instructions, updates)
    u, sizes, v = np.linalg.svd(mean.astype(np.float64))
    for instruction in method.instruct(setup, state, 2, [slow, fast]):
        rank = ranks[instruction.client]
        named = instruction.tensors[0]
        assert named["0.lora_A.weight"].shape == (rank, WIDTH_OF_MODEL)
        nearest = (u[:, :rank] * sizes[:rank]) @ v[:rank]
        found = named["0.lora_B.weight"].astype(np.float64) @ named["0.lora_A.weight"]
        np.testing.assert_allclose(found, nearest, atol=1e-4)
        assert instruction.adapter.alpha == 2 * rank
        assert instruction.objective.rank_penalty is None
        evaluation = method.evaluate_client(setup, state, 3, instruction.client)
        assert evaluation.evaluate_only
        assert_same(evaluation.tensors, instruction.tensors)


@pytest.mark.parametrize("name", EXACT)
def test_a_round_without_replies_leaves_the_state(name: str) -> None:
    setup, method = shaped(f"method={name}"), METHODS[name]
    state = method.init(setup)
    assert method.merge(setup, state, method.instruct(setup, state, 1, [0]), []) is state
