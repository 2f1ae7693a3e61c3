"""The contract of every transport: what comes back depends on the Plan alone."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from droppeft.config import load_config, resolve
from droppeft.errors import DroppeftError
from droppeft.messages import LayerAdapter, Plan, Update, flatten
from droppeft.server.prepare import Prepared, prepare
from droppeft.transports.base import Transport
from droppeft.transports.registry import TRANSPORTS, transport_named


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, tiny_words: list[str]) -> Iterator[Transport]:
    """One of each, opened once: an engine takes seconds to start."""
    config = resolve(load_config(None, tiny_words), cuda=False)
    with TRANSPORTS[request.param](prepare(config, lambda step: None).loaded) as transport:
        yield transport


def ask(transport: Transport, plans: list[Plan]) -> dict[int, Update]:
    replies = {arrival.index: arrival.reply for arrival in transport.exchange(plans)}
    assert sorted(replies) == list(range(len(plans)))
    answers = {}
    for index, reply in replies.items():
        assert isinstance(reply, Update)
        answers[plans[index].device] = reply
    return answers


def assert_same(one: Update, other: Update) -> None:
    """The same but for the clock."""
    left, right = list(flatten(one.tensors)), list(flatten(other.tensors))
    assert [item[:2] for item in left] == [item[:2] for item in right]
    for (_, name, first), (_, _, second) in zip(left, right, strict=True):
        np.testing.assert_array_equal(first, second, err_msg=name)
    assert replace(one, tensors={}, cost=other.cost) == replace(other, tensors={})
    assert one.cost.tokens == other.cost.tokens
    assert one.cost.activation_bytes_peak == other.cost.activation_bytes_peak


def test_every_plan_is_answered_once(transport: Transport, plans: list[Plan]) -> None:
    answers = ask(transport, plans)
    assert sorted(answers) == [0, 1, 3]
    for plan in plans:
        answer = answers[plan.device]
        assert (answer.round, answer.device, answer.nonce) == (
            plan.round,
            plan.device,
            plan.nonce,
        )


def test_nobody_is_asked_nobody_answers(transport: Transport) -> None:
    assert list(transport.exchange([])) == []


def test_the_same_plan_gives_the_same_answer(transport: Transport, plans: list[Plan]) -> None:
    first, second = ask(transport, plans), ask(transport, plans)
    for device, answer in first.items():
        assert_same(answer, second[device])


def test_devices_differ(transport: Transport, plans: list[Plan]) -> None:
    answers = ask(transport, plans)
    assert len({answer.train_loss for answer in answers.values()}) == 3


def test_the_order_of_plans_does_not_change_an_answer(
    transport: Transport, plans: list[Plan]
) -> None:
    forwards, backwards = ask(transport, plans), ask(transport, plans[::-1])
    for device, answer in forwards.items():
        assert_same(answer, backwards[device])


def test_an_answer_does_not_depend_on_what_was_done_before_or_where(
    transport: Transport, prepared: Prepared, plans: list[Plan]
) -> None:
    wide = LayerAdapter("lora", rank=2)
    other_spec = replace(plans[0].adapter, layers=(wide, None, wide, None), dropout=0.3)
    other = replace(
        plans[0],
        round=2,
        adapter=other_spec,
        tensors=prepared.setup.fresh_tensors(other_spec),
        dropout=None,
    )
    ask(transport, [other, plans[2]])
    with TRANSPORTS["in_process"](prepared.loaded) as unused:
        assert_same(ask(transport, plans[1:2])[1], ask(unused, plans[1:2])[1])


def test_an_unknown_transport_is_named_with_those_there_are() -> None:
    with pytest.raises(DroppeftError, match="transport=post: unknown transport; known are in_pro"):
        transport_named("post")
