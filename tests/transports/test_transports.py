"""The contract of every transport: a reply depends on the instruction alone."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from droppeft.config import load_config, resolve
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction, LayerAdapter
from droppeft.messages.reply import Update
from droppeft.messages.tensors import flatten
from droppeft.server.prepare import Prepared, prepare
from droppeft.transports.base import Transport
from droppeft.transports.registry import TRANSPORTS, transport_named


@pytest.fixture(
    scope="module",
    params=[
        name if name == "in_process" else pytest.param(name, marks=pytest.mark.full)
        for name in TRANSPORTS
    ],
)
def transport(request: pytest.FixtureRequest, tiny_overrides: list[str]) -> Iterator[Transport]:
    """Each transport, opened once: a simulation engine takes seconds to start."""
    config = resolve(load_config(None, tiny_overrides), cuda=False)
    with TRANSPORTS[request.param](prepare(config, lambda step: None).loaded) as transport:
        yield transport


def ask(transport: Transport, instructions: list[Instruction]) -> dict[int, Update]:
    replies = {arrival.index: arrival.reply for arrival in transport.exchange(instructions)}
    assert sorted(replies) == list(range(len(instructions)))
    updates = {}
    for index, reply in replies.items():
        assert isinstance(reply, Update)
        updates[instructions[index].client] = reply
    return updates


def assert_same(one: Update, other: Update) -> None:
    """Equal except for measured times."""
    left, right = list(flatten(one.tensors)), list(flatten(other.tensors))
    assert [item[:2] for item in left] == [item[:2] for item in right]
    for (_, name, first), (_, _, second) in zip(left, right, strict=True):
        np.testing.assert_array_equal(first, second, err_msg=name)
    assert replace(one, tensors={}, cost=other.cost) == replace(other, tensors={})
    assert one.cost.tokens == other.cost.tokens
    assert one.cost.activation_bytes_peak == other.cost.activation_bytes_peak


def test_every_instruction_has_one_reply(
    transport: Transport, instructions: list[Instruction]
) -> None:
    updates = ask(transport, instructions)
    assert sorted(updates) == [0, 1, 3]
    for instruction in instructions:
        update = updates[instruction.client]
        assert (update.round, update.client, update.nonce) == (
            instruction.round,
            instruction.client,
            instruction.nonce,
        )


def test_no_instructions_give_no_replies(transport: Transport) -> None:
    assert list(transport.exchange([])) == []


def test_the_same_instruction_gives_the_same_reply(
    transport: Transport, instructions: list[Instruction]
) -> None:
    first, second = ask(transport, instructions), ask(transport, instructions)
    for client, update in first.items():
        assert_same(update, second[client])


def test_clients_differ(transport: Transport, instructions: list[Instruction]) -> None:
    updates = ask(transport, instructions)
    assert len({update.train_loss for update in updates.values()}) == 3


def test_the_order_of_instructions_does_not_change_replies(
    transport: Transport, instructions: list[Instruction]
) -> None:
    forwards, backwards = ask(transport, instructions), ask(transport, instructions[::-1])
    for client, update in forwards.items():
        assert_same(update, backwards[client])


def test_a_reply_depends_neither_on_earlier_instructions_nor_on_the_place(
    transport: Transport, prepared: Prepared, instructions: list[Instruction]
) -> None:
    wide = LayerAdapter("lora", rank=2)
    other_spec = replace(instructions[0].adapter, layers=(wide, None, wide, None), dropout=0.3)
    other = replace(
        instructions[0],
        round=2,
        adapter=other_spec,
        tensors=prepared.setup.fresh_tensors(other_spec),
        dropout=None,
    )
    ask(transport, [other, instructions[2]])
    with TRANSPORTS["in_process"](prepared.loaded) as in_process:
        assert_same(ask(transport, instructions[1:2])[1], ask(in_process, instructions[1:2])[1])


def test_an_unknown_transport_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(DroppeftError, match="transport=post: unknown transport; known are in_pro"):
        transport_named("post")
