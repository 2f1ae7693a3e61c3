"""Every adapter type with layer dropout in a custom training loop.

If a step drops a layer, its adapter has no gradient and does not change, while all others are
updated. This is tested with both kinds of checkpointing, in half precision and with gradient
accumulation.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

import adapter_contract as contract
from adapter_contract import DROPPED, EVERY, LAYERS, Attached
from architecture_contract import calls_inside
from droppeft.adapters.types import TYPES
from droppeft.layer_dropout import layer_dropout
from droppeft.messages.tensors import LayerKey

WITHOUT = tuple(layer != DROPPED for layer in range(LAYERS))
RATES = [0.0 if runs else 0.5 for runs in WITHOUT]
Optimizer = torch.optim.Optimizer


def loss(attached: Attached, rows: slice = slice(None)) -> torch.Tensor:
    columns = {name: column[rows] for name, column in contract.texts().items()}
    found: torch.Tensor = attached.model(**columns).loss
    return found


def plainly(attached: Attached, optimizer: Optimizer) -> None:
    loss(attached).backward()
    optimizer.step()


def recomputing(attached: Attached, optimizer: Optimizer, reentrant: bool) -> None:
    attached.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    attached.model.enable_input_require_grads()
    plainly(attached, optimizer)


def reentrant(attached: Attached, optimizer: Optimizer) -> None:
    recomputing(attached, optimizer, reentrant=True)


def non_reentrant(attached: Attached, optimizer: Optimizer) -> None:
    recomputing(attached, optimizer, reentrant=False)


def in_bf16(attached: Attached, optimizer: Optimizer) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(attached)
    found.backward()
    optimizer.step()


def in_fp16(attached: Attached, optimizer: Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", dtype=torch.float16):
        found = loss(attached)
    scaler.scale(found).backward()
    scaler.step(optimizer)


def accumulating(attached: Attached, optimizer: Optimizer) -> None:
    for rows in (slice(4), slice(4, None)):
        (loss(attached, rows) / 2).backward()
    optimizer.step()


class Step(NamedTuple):
    """Results of a step: gradients and values of tensors by group, and calls by layer."""

    gradients: dict[LayerKey, list[torch.Tensor | None]]
    values: dict[LayerKey, list[torch.Tensor]]
    calls: list[int]


def train(name: str, way: Callable[[Attached, Optimizer], None]) -> list[Step]:
    """Take a step that runs every layer (so that all have momentum) and one that drops a layer."""
    attached = Attached(contract.case(name, "bert"))
    attached.scramble()
    trained = [value for value in attached.model.train().parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    steps = []
    with layer_dropout(attached.model, optimizer, rates=RATES) as dropout:
        for active in (EVERY, WITHOUT):
            while dropout.active != active:
                dropout.step += 1
            number = dropout.step
            torch.manual_seed(5)
            with calls_inside(list(attached.blocks)) as calls:
                way(attached, optimizer)
            assert dropout.step == number + 1
            steps.append(Step(gradients(attached), values(attached), calls))
            optimizer.zero_grad()
    return steps


def gradients(attached: Attached) -> dict[LayerKey, list[torch.Tensor | None]]:
    return {
        key: [None if value.grad is None else value.grad.clone() for value in named.values()]
        for key, named in attached.groups.items()
    }


def values(attached: Attached) -> dict[LayerKey, list[torch.Tensor]]:
    return {
        key: [value.detach().clone() for value in named.values()]
        for key, named in attached.groups.items()
    }


def assert_only_dropped_layer_unchanged(steps: list[Step]) -> None:
    """In the second step, which drops a layer."""
    first, second = steps
    for key, found in first.gradients.items():
        assert all(value is not None and value.isfinite().all() for value in found), key
    for key, found in second.gradients.items():
        assert found
        assert all((value is None) == (key == DROPPED) for value in found), key
        pairs = zip(first.values[key], second.values[key], strict=True)
        assert all(torch.equal(*pair) == (key == DROPPED) for pair in pairs), key


@cache
def without_checkpoints(name: str) -> list[Step]:
    return train(name, plainly)


@pytest.mark.sample("*-plainly", "lora-*", "bottleneck-*")
@pytest.mark.parametrize("way", [plainly, in_bf16, in_fp16, accumulating])
@pytest.mark.parametrize("name", contract.USABLE)
def test_the_adapter_of_a_dropped_layer_does_not_change(
    name: str, way: Callable[..., None]
) -> None:
    steps = without_checkpoints(name) if way is plainly else train(name, way)
    if TYPES[name].kind != "global":
        assert {*range(LAYERS)} <= steps[0].values.keys()
    assert_only_dropped_layer_unchanged(steps)


@pytest.mark.sample("lora-*", "bottleneck-*")
@pytest.mark.parametrize("way", [non_reentrant, reentrant])
@pytest.mark.parametrize("name", [name for name in contract.USABLE if name != "prefix_tuning"])
def test_checkpointing_changes_no_bit(name: str, way: Callable[..., None]) -> None:
    steps = train(name, way)
    assert_only_dropped_layer_unchanged(steps)
    for ours, theirs in zip(steps, without_checkpoints(name), strict=True):
        for part in ("gradients", "values"):
            mine, plain = flat(getattr(ours, part)), flat(getattr(theirs, part))
            for one, other in zip(mine, plain, strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)
        for now, before in zip(ours.calls, theirs.calls, strict=True):
            assert before < now <= 2 * before if before else now == 0  # it was enabled


def flat(groups: dict[LayerKey, list[Any]]) -> list[Any]:
    return [value for found in groups.values() for value in found]


def test_transformers_checkpointing_does_not_work_with_prefixes() -> None:
    """Neither with gates nor without: it discards the cache. The table of adapters says so."""
    attached = Attached(contract.case("prefix_tuning", "bert"))
    attached.model.train().activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="must match the size"):
        loss(attached)
    assert "transformers' own gradient checkpointing" in TYPES["prefix_tuning"].note
