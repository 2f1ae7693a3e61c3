"""Who is left out because its changes point against those of the others, over the run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import ServerConfig
from droppeft.messages.instruction import AdapterSpec
from droppeft.messages.reply import Failure, Update
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import HEAD
from droppeft.sharing.direction_check import (
    Directions,
    compare_directions,
    median_of_others,
    without_opposed,
)
from handmade import LAYERS, filled, instruction_for, update_for

MODEL = GlobalModel(AdapterSpec((None,) * LAYERS), filled(1.0))


def compare(
    updates: list[Update], so_far: Mapping[int, float] | None = None, **settings: Any
) -> Directions:
    instructions = [instruction_for(update.client) for update in updates]
    server = ServerConfig.model_validate(settings)
    return compare_directions(server, MODEL, instructions, updates, so_far or {})


def changing(*changes: float) -> list[Update]:
    """An update of each client, in which every value of the model changes by this."""
    return [update_for(instruction_for(c), 1 + change) for c, change in enumerate(changes)]


@given(st.integers(3, 9), st.integers(0, 2**32))
def test_the_median_of_the_others_of_each_value(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-2, 3, (count, 20)).astype(np.float64)
    expected = [np.median(np.delete(values, index, axis=0), axis=0) for index in range(count)]
    np.testing.assert_array_equal(median_of_others(values), expected)


@pytest.mark.parametrize("factor", [1.0, 0.01, 1e30])
def test_a_sign_flip_of_any_size_is_left_out(factor: float) -> None:
    updates = changing(1.0, 2.0, -factor, *[1.0] * 17)
    found = compare(updates)
    assert found.opposed == (2,)
    assert found.agreement == pytest.approx({**dict.fromkeys(range(20), 1.0), 2: -1.0})
    replies = without_opposed([*updates, Failure(20, "asleep")], found)
    assert [r.client for r in replies if isinstance(r, Failure)] == [2, 20]
    assert all(replies[index] is updates[index] for index in range(20) if index != 2)


def test_updates_that_agree_or_are_few_are_merged_as_they_are() -> None:
    for updates in (changing(2.0, *[1.0] * 19), changing(-1.0, *[1.0] * 18)):
        found = compare(updates)
        assert found.opposed == ()
        assert all(a is b for a, b in zip(without_opposed(updates, found), updates, strict=True))
    assert compare(changing(-1.0, *[1.0] * 19), direction_check=False) == Directions({})


def test_the_sum_over_the_run_decides() -> None:
    """One round against the others is forgiven after two with them, and the other way round."""
    found = compare(changing(-1.0, *[1.0] * 19), {0: 1.5, 99: 3.0})
    assert found.opposed == ()
    assert (found.agreement[0], found.agreement[99]) == (pytest.approx(0.5), 3.0)
    alike = changing(*[1.0] * 20)
    assert compare(alike, {2: -1.5}).opposed == (2,)
    assert compare(alike, {2: -0.5}).opposed == ()


def test_most_updates_are_always_kept() -> None:
    found = compare(changing(*[1.0] * 20), {client: client - 40.0 for client in range(20)})
    assert found.opposed == tuple(range(9))


def test_a_round_without_a_common_direction_says_little() -> None:
    """The median of the others is then short, and its square counts."""
    rng = np.random.default_rng(0)
    updates = [
        update_for(
            instruction_for(client),
            tensors={HEAD: {"head.W": rng.normal(size=10_000).astype(np.float32)}},
        )
        for client in range(20)
    ]
    assert max(map(abs, compare(updates).agreement.values())) < 0.01


def test_a_layer_is_compared_among_those_who_have_it() -> None:
    """The last client goes against the others in layer 3, which two of them do not have."""
    both, first, opposed = {0: 1.0, 3: 1.0}, {0: 1.0}, {0: 0.2, 3: -1.0}
    rows = [first, first, *[both] * 19, opposed]
    updates = [
        update_for(
            instruction_for(client),
            tensors={
                key: {f"layer.{key}.A": np.full(2, 1 + change, np.float32)}
                for key, change in row.items()
            },
        )
        for client, row in enumerate(rows)
    ]
    assert compare(updates).opposed == (21,)
    assert compare(updates[:2] + updates[3:]).opposed == ()  # 19 have layer 3: not compared


def test_of_several_shapes_the_common_part_is_compared() -> None:
    """As of LoRA's matrices with different ranks; a client without a common tensor is kept."""
    shapes = [(2, 3), (1, 3), *[(2, 3)] * 17, (4, 3)]
    values = [*[2.0] * 19, 0.0]
    updates = [
        update_for(
            instruction_for(client), tensors={9: {"new": np.full(shape, value - 1, np.float32)}}
        )
        for client, (shape, value) in enumerate(zip(shapes, values, strict=True))
    ]
    updates.append(update_for(instruction_for(20), tensors={8: {"other": np.ones(2, np.float32)}}))
    found = compare(updates)
    assert found.opposed == (19,)
    assert found.agreement[20] == 0.0
