"""Rewards by agreement: how far a local training agrees with the others of its round."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from droppeft.bandit.rewards import agreements, rewards_of
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure, Update
from droppeft.messages.tensors import HEAD
from droppeft.methods import METHODS
from handmade import filled, instruction_for, setup_for, update_for

AGREEING = ("configurator.policy=budgeted_thompson", "configurator.reward=agreement")


def change(*values: float, key: int = 0) -> dict[tuple[int | str, str], Any]:
    return {(key, "x"): np.array(values)}


def test_the_product_with_the_mean_of_the_others() -> None:
    """Changes (1, 0), (2, 0), (0, 3) with weights 1, 1, 2: products over their mean size.

    The means of the others: (2/3, 2), (1/3, 2), (1.5, 0); products 2/3, 2/3, 0; mean size 4/9.
    """
    found = agreements([change(1, 0), change(2, 0), change(0, 3)], [1, 1, 2])
    assert found == pytest.approx([1.5, 1.5, 0.0])


def test_a_change_against_the_others_has_a_negative_reward() -> None:
    found = agreements([change(1.0), change(1.0), change(-1.0)], [1, 1, 1])
    assert found[2] is not None
    assert found[2] < 0


def test_the_mean_of_a_tensor_is_over_those_who_changed_it() -> None:
    whole = {**change(1.0), **change(5.0, key=1)}
    found = agreements([whole, change(1.0), change(2.0, key=2)], [1, 1, 1])
    assert found == [1.0, 1.0, None]


def test_there_is_no_reward_without_movement_or_with_one_client() -> None:
    assert agreements([change(0.0), change(0.0)], [1, 1]) == [None, None]
    assert agreements([change(1.0)], [1]) == [None]
    assert agreements([], []) == []


def exchanged(*values: float) -> tuple[list[Instruction], list[Update]]:
    instructions = [instruction_for(client) for client in range(len(values))]
    return instructions, [
        update_for(instruction, value)
        for instruction, value in zip(instructions, values, strict=True)
    ]


def test_changes_are_relative_to_the_instruction_without_the_head() -> None:
    """From 1 to 2, 3 and 1 in eight values: before scaling the products are 8, 8·2·.5 = 8 and 0."""
    setup = setup_for(*AGREEING)
    instructions, updates = exchanged(2.0, 3.0, 1.0)
    far = replace(updates[2], tensors={**updates[2].tensors, HEAD: filled(900.0)[HEAD]})
    assert rewards_of(setup, instructions, [*updates[:2], far]) == pytest.approx([1.5, 1.5, 0.0])


def test_failures_have_no_reward() -> None:
    setup = setup_for(*AGREEING)
    instructions, updates = exchanged(2.0, 3.0, 9.0)
    replies = [updates[0], Failure(1, "late"), updates[2]]
    assert rewards_of(setup, instructions, replies) == pytest.approx([1.0, None, 1.0])


def test_personal_tensors_do_not_count() -> None:
    setup = setup_for(*AGREEING)
    instructions, updates = exchanged(2.0, 3.0)
    without = {key: named for key, named in instructions[0].tensors.items() if key == HEAD}
    assert (
        rewards_of(setup, [replace(instructions[0], tensors=without), instructions[1]], updates)
        == [None] * 2
    )


def test_arms_are_learnt_although_no_client_measures() -> None:
    setup, method = setup_for(*AGREEING, "cohort_size=6"), METHODS["droppeft"]
    measured = setup_for(AGREEING[0], "configurator.reward=loss")
    state = method.init(setup)
    instructions = method.instruct(setup, state, 1, range(6))
    assert {instruction.reward_rows for instruction in instructions} == {0}
    assert {each.reward_rows for each in method.instruct(measured, state, 1, [1])} == {16}
    state = method.merge(
        setup, state, instructions, [update_for(instruction, 2.0) for instruction in instructions]
    )
    noted = method.note(setup, state)
    assert noted is not None
    assert sum(noted["trials"]) == 6
    assert all(reward is not None for reward in noted["rewards"].values())
