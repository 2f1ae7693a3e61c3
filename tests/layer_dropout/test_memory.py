"""Dropped blocks store nothing, and gradient checkpointing does not recompute them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from droppeft.layer_dropout import find_blocks, gated

Batch = dict[str, torch.Tensor]
LAYERS = 4


def stored_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that a forward stores for its backward, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            stored[storage.data_ptr()] = storage  # keeps it alive, so that addresses are unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in stored.values())


def test_dropped_blocks_store_nothing(model: PreTrainedModel, batch: Batch) -> None:
    model.train()
    del batch["attention_mask"]
    _, blocks = find_blocks(model)
    with gated(blocks) as gates:

        def stored(*active: int) -> int:
            gates.active = map(bool, active)
            return stored_bytes(model, batch)

        model(**batch)
        one, two, four = stored(0, 0, 0, 1), stored(1, 0, 1, 0), stored(1, 1, 1, 1)
        # What blocks share (masks, position tables) is stored for the first one that runs.
        block = two - one
        assert block > 0
        assert four - two == 2 * block
        assert one - stored(0, 0, 0, 0) >= block


def test_finding_out_what_blocks_return_stores_nothing(
    model: PreTrainedModel, batch: Batch
) -> None:
    model.train()
    _, blocks = find_blocks(model)
    with gated(blocks) as gates:
        gates.active = (False,) * LAYERS
        probing = stored_bytes(model, batch)
        assert probing == stored_bytes(model, batch)


def checkpointed_step(
    model: Any, batch: Batch, active: tuple[bool, ...]
) -> tuple[list[Any], tuple[int, ...], list[int]]:
    """Return gradients, the counts of the gates, and how often each block really ran."""
    _, blocks = find_blocks(model)
    runs = [0] * LAYERS

    def count(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs[index] += 1

        return hook

    hooks = [
        next(block.children()).register_forward_pre_hook(count(index))
        for index, block in enumerate(blocks)
    ]
    model.zero_grad()
    with gated(blocks) as gates:
        model(**batch)  # what blocks return is known afterwards
        gates.reset_executed()
        runs[:] = [0] * LAYERS
        gates.active = active
        torch.manual_seed(3)
        loss = model(**batch).loss
        gates.active = tuple(not runs for runs in active)  # must not affect the backward
        loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return gradients, gates.executed, runs


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputation_does_not_use_the_gate(
    model: PreTrainedModel, batch: Batch, reentrant: bool
) -> None:
    lora = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, lora).train()
    active = (True, False, True, False)
    plain, executed, runs = checkpointed_step(model, batch, active)
    assert executed == (1, 0, 1, 0)
    assert runs == [1, 0, 1, 0]

    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    gradients, executed, runs = checkpointed_step(model, batch, active)
    assert executed == (1, 0, 1, 0)
    assert runs == [2, 0, 2, 0]  # forward and recomputation: checkpointing was enabled
    for mine, theirs in zip(gradients, plain, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
