"""Instructions, updates and setups of methods, created by hand and without a model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from droppeft.config import load_config, resolve, resolve_layers
from droppeft.costs.device_profiles import make_fleet
from droppeft.costs.modelled_clock import Arithmetic
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.layer_dropout import Mode
from droppeft.messages.instruction import (
    AdapterSpec,
    Budget,
    Instruction,
    LocalTraining,
    Objective,
    modes_of,
)
from droppeft.messages.reply import MeasuredCost, Update
from droppeft.messages.tensors import HEAD, Array, Layout, Tensors, flatten, restrict
from droppeft.methods import Setup
from droppeft.server.round_cost import make_clock
from droppeft.sharing.selection import count_of
from droppeft.transports.base import Arrival

LAYERS = 4


def step_flops(counts: StepCounts, active: Sequence[bool]) -> int:
    """FLOPs of a step that runs the blocks where ``active`` (L) is true."""
    blocks = zip(counts.blocks, active, strict=True)
    return counts.rest.flops + sum(block.flops for block, runs in blocks if runs)


def step_stored_bytes(counts: StepCounts, active: Sequence[bool]) -> int:
    """Bytes that a step with these active blocks stores for its backward."""
    blocks = zip(counts.blocks, active, strict=True)
    return counts.rest.stored_bytes + sum(block.stored_bytes for block, runs in blocks if runs)


COST = MeasuredCost(
    total_wall_s=3.0,
    train_wall_s=2.0,
    reward_wall_s=0.5,
    activation_bytes_peak=100,
    tokens=64,
    rows=8,
    layer_tokens=(64, 32, 32, 64),
    forward_tokens=(0, 0, 0, 0),
    reward_tokens=0,
)
FORWARD, BACKWARD, REST = 10**9, 2 * 10**9, 10**10
"""FLOPs per token of an invented model: of a layer forward and backward, and of the rest, whose
backward pass takes as many again."""


def counts_at(length: int, batch: int = 2) -> StepCounts:
    """Counts of a model whose operations are proportional to the tokens."""
    tokens = batch * length
    block = BlockCounts(FORWARD * tokens, BACKWARD * tokens, 0, 0, 0, 0)
    rest = BlockCounts(REST * tokens, REST * tokens, 0, 0, 0, 0)
    return StepCounts(batch, length, (block,) * LAYERS, rest, 0)


ARITHMETIC = Arithmetic((counts_at(4), counts_at(8), counts_at(16)))


def filled(value: float, num_layers: int = LAYERS) -> Tensors:
    """Two values in every layer and one in the head, all equal."""
    layers: dict[int | str, dict[str, Array]] = {
        layer: {f"layer.{layer}.A": np.full(2, value, np.float32)} for layer in range(num_layers)
    }
    return {**layers, HEAD: {"head.W": np.full(1, value, np.float32)}}


def fresh(spec: AdapterSpec) -> Tensors:
    """Initial values of an adapter: all 1."""
    return filled(1.0, len(spec.layers))


def layout(spec: AdapterSpec) -> Layout:
    """The tensors of :func:`fresh`."""
    return {name: (key, array.shape) for key, name, array in flatten(fresh(spec))}


def setup_for(*overrides: str) -> Setup:
    """Setup of a method (droppeft): four layers, and cohorts of three of ten clients."""
    settings = ("clients=10", "cohort_size=3", "training.local_steps=2", "training.precision=fp32")
    config = load_config(None, [*settings, *overrides], "droppeft")
    config = resolve_layers(config, LAYERS)
    fleet = make_fleet(config.clock, config.clients, config.seed)
    return Setup(config, LAYERS, fresh, layout, make_clock(fleet, lambda spec: ARITHMETIC))


def assert_same(first: Tensors, second: Tensors) -> None:
    """The same tensors in the same order, bit for bit."""
    one, other = list(flatten(first)), list(flatten(second))
    assert [item[:2] for item in one] == [item[:2] for item in other]
    for (_, name, left), (_, _, right) in zip(one, other, strict=True):
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


TRAINING = LocalTraining(
    batch_size=16,
    micro_batch_size=None,
    learning_rate=1e-3,
    head_learning_rate=1e-2,
    loraplus_lr_ratio=1.0,
    schedule="linear",
    warmup_fraction=0.05,
    rounds=15,
    weight_decay=0.01,
    clip_norm=1.0,
    precision="fp32",
    backbone_dropout=False,
    checkpointing=False,
    evaluation_batch_size=64,
)
"""Settings of local training that are the defaults of the configuration."""


def instruction_for(client: int = 3, round: int = 1, **changes: Any) -> Instruction:
    """An instruction for :func:`filled` tensors, all of them shared."""
    instruction = Instruction(
        round=round,
        client=client,
        adapter=AdapterSpec(layers=(None,) * LAYERS, alpha=16.0),
        tensors=filled(1.0),
        train=None,
        share=frozenset({"head.W", *(f"layer.{layer}.A" for layer in range(LAYERS))}),
        dropout=None,
        objective=Objective(),
        base_delta=None,
        budget=Budget(steps=2),
        training=TRAINING,
        reward_rows=0,
        seed=0,
        nonce=f"nonce {round} {client}",
    )
    return replace(instruction, **changes)


def update_for(instruction: Instruction, value: float = 5.0, **changes: Any) -> Update:
    """A valid Update, in which all tensors have the same value.

    With a sharing rule, the first layers are shared.
    """
    rule = instruction.sharing
    count = LAYERS if rule is None else count_of(rule.fraction, LAYERS)
    personal = range(count, LAYERS)
    update = Update(
        round=instruction.round,
        client=instruction.client,
        nonce=instruction.nonce,
        tensors=restrict(
            {
                key: {name: np.full_like(array, value) for name, array in named.items()}
                for key, named in instruction.tensors.items()
                if key not in personal
            },
            instruction.share,
        ),
        examples=8,
        targets=changes.get("examples", 8),
        steps=2,
        active_steps=_where_trained(instruction, (2, 1, 1, 2)),
        importance=(0.1, 0.2, 0.3, 0.4),
        train_loss=0.7,
        reward=None,
        cost=replace(
            COST,
            layer_tokens=_where_trained(instruction, COST.layer_tokens),
            personal_steps=0 if instruction.personal_adapter is None else 2,
            personal_tokens=0 if instruction.personal_adapter is None else 64,
        ),
        shared=None if rule is None else tuple(range(count)),
        scores=None if rule is None else (0.0,) * LAYERS,
    )
    return replace(update, **changes)


def _where_trained(instruction: Instruction, counts: Sequence[int]) -> tuple[int, ...]:
    """Counts of the layers, 0 for those that the instruction does not let a step train."""
    shares = modes_of(instruction).shares()[Mode.TRAIN]
    return tuple(count * (share > 0) for count, share in zip(counts, shares, strict=True))


WIDTH_OF_MODEL = 3


def fresh_shaped(spec: AdapterSpec) -> Tensors:
    """Initial values in the shapes of LoRA or bottlenecks: A and down-projections 1, the rest 0."""
    tensors: dict[Any, dict[str, Array]] = {}
    for layer, adapter in enumerate(spec.layers):
        if adapter is None:
            continue
        rank = adapter.rank or adapter.width or 0
        first, last = ("lora_A", "lora_B") if adapter.rank else ("down", "up")
        tensors[layer] = {
            f"{layer}.{first}.weight": np.ones((rank, WIDTH_OF_MODEL), np.float32),
            f"{layer}.{last}.weight": np.zeros((WIDTH_OF_MODEL, rank), np.float32),
        }
    return {**tensors, HEAD: {"head.W": np.zeros(1, np.float32)}}


def layout_shaped(spec: AdapterSpec) -> Layout:
    """The tensors of :func:`fresh_shaped`."""
    return {name: (key, array.shape) for key, name, array in flatten(fresh_shaped(spec))}


def shaped(*overrides: str) -> Setup:
    """Setup of a method in which tensors have the shapes of the adapter."""
    config = resolve(setup_for(*overrides).config, cuda=False)
    fleet = make_fleet(config.clock, config.clients, config.seed)
    clock = make_clock(fleet, lambda spec: ARITHMETIC)
    return Setup(config, LAYERS, fresh_shaped, layout_shaped, clock)


class Scripted:
    """A transport with given replies of clients, in the order of the instructions or backwards."""

    def __init__(
        self, replies_to: Callable[[Instruction], list[Any]], *, backwards: bool = False
    ) -> None:
        self.replies_to = replies_to
        self.backwards = backwards

    def exchange(self, instructions: Any) -> Any:
        replies = [
            Arrival(index, reply)
            for index, instruction in enumerate(instructions)
            for reply in self.replies_to(instruction)
        ]
        yield from reversed(replies) if self.backwards else replies
