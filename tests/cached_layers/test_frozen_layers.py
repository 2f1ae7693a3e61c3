"""A model that starts after its frozen layers computes what the whole model computes."""

import json
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import nn

import architecture_contract as contract
from architecture_contract import CASES, Case
from droppeft.cached_layers import FrozenLayers
from droppeft.layer_dropout import find_blocks, gated
from droppeft.layer_dropout.modes import Mode, skipping

RECORD = json.loads(contract.FILE.read_text(encoding="utf-8"))
TWO_STACKS = {row["model_type"] for row in RECORD["cases"] if len(row["blocks"]) == 2}
ONE_STACK = [case for case in CASES if case.model_type not in TWO_STACKS]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns that special tokens exceed the small vocabularies of these models."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def bert() -> nn.Module:
    [case] = [one for one in CASES if one.name == "bert"]
    return contract.build(case)


def token_batch(rows: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(rows * length).reshape(rows, length) + 3}


@pytest.mark.sample("bert", "deberta-v2", "gpt2", "gpt_neo", "llama", "modernbert")
@pytest.mark.parametrize("case", ONE_STACK, ids=lambda case: case.name)
def test_states_replace_the_frozen_layers_in_every_architecture(case: Case) -> None:
    model, columns = contract.build(case), contract.batch(case)
    expected = contract.hidden(model(**columns))
    _, blocks = find_blocks(model)
    with gated(blocks) as gates:
        for depth in range(1, len(blocks)):
            frozen = FrozenLayers(model, blocks, depth)
            frozen.open(gates)
            states = frozen.states(columns)
            gates.reset_executed()
            frozen.skip(gates, (Mode.TRAIN,) * len(blocks), states)
            found = contract.hidden(model(**columns))
            assert torch.equal(found, expected), depth
            assert gates.executed == (0,) * depth + (1,) * (len(blocks) - depth)


def test_the_rest_of_the_model_does_not_run_for_states() -> None:
    model = bert()
    _, blocks = find_blocks(model)
    with gated(blocks) as gates:
        FrozenLayers(model, blocks, 2).states(token_batch())
        assert gates.executed == (1, 1, 0)


def test_frozen_layers_run_without_dropout_and_modes_are_restored() -> None:
    model = bert()
    _, blocks = find_blocks(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    frozen = FrozenLayers(model, blocks, 2)
    expected = frozen.states(token_batch())
    model.train()
    blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(frozen.states(token_batch()), expected)
    assert [module.training for module in model.modules()] == modes
    assert any(modes)
    assert not all(modes)


def test_frozen_layers_have_no_gradient_and_later_layers_can_be_dropped() -> None:
    model = bert()
    _, blocks = find_blocks(model)
    frozen = FrozenLayers(model, blocks, 1)
    with gated(blocks) as gates:
        states = frozen.states(token_batch())
        assert not states.requires_grad
        frozen.skip(gates, skipping((True, False, True)), states)
        assert gates.active == (False, False, True)
        contract.hidden(model(**token_batch())).sum().backward()
        assert gates.executed == (1, 0, 1)
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert any(name.startswith("encoder.layer.2.") for name in trained)
    below = ("embeddings.", "encoder.layer.0.", "encoder.layer.1.")
    assert not [name for name in trained if name.startswith(below)]


def test_an_error_inside_the_frozen_layers_is_raised() -> None:
    model = bert()
    _, blocks = find_blocks(model)
    with pytest.raises(IndexError):
        FrozenLayers(model, blocks, 1).states({"input_ids": torch.tensor([[10_000]])})
