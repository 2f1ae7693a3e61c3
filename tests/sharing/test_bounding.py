"""What one update may do to a merge: bounds of its change and of its weight."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import median_low
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import ServerConfig
from droppeft.messages.instruction import AdapterSpec
from droppeft.messages.reply import Failure, Update
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import HEAD, LayerKey
from droppeft.sharing.bounding import bounded, change_of
from handmade import LAYERS, filled, instruction_for, update_for

MODEL = GlobalModel(AdapterSpec((None,) * LAYERS), filled(1.0))
KEYS: list[LayerKey] = [*range(LAYERS), HEAD]


def settings(**changes: Any) -> ServerConfig:
    return ServerConfig.model_validate({"clip_norm_multiple": 2.0, **changes})


def bound(updates: list[Update], **changes: Any) -> tuple[list[Any], Mapping[int, float]]:
    instructions = [instruction_for(update.client) for update in updates]
    replies, bounds = bounded(settings(**changes), MODEL, instructions, updates)
    return replies, bounds.clipped


def sending(client: int, values: Mapping[LayerKey, float]) -> Update:
    """An update that has these layers, filled with 1 plus the value."""
    tensors = {
        key: {name: np.full_like(array, 1 + values[key]) for name, array in named.items()}
        for key, named in MODEL.tensors.items()
        if key in values
    }
    return update_for(instruction_for(client), tensors=tensors)


def norm(update: Update, key: LayerKey) -> float:
    """The norm of a layer's change, as it would be computed by hand."""
    named = update.tensors[key].items()
    squares = (
        np.square(change_of(instruction_for(update.client), MODEL, key, name, value)).sum()
        for name, value in named
    )
    return float(np.sqrt(sum(squares)))


layers = st.dictionaries(
    st.sampled_from(KEYS), st.floats(-1e3, 1e3, width=32).filter(bool), min_size=1
)


@given(st.lists(layers, min_size=1, max_size=7), st.sampled_from((0.0, 1.0, 1.5, 2.0)))
def test_a_change_beyond_a_multiple_of_the_median_is_scaled_to_the_median(
    sent: list[dict[LayerKey, float]], multiple: float
) -> None:
    """Of layers that three or more clients sent; a change within the bound keeps its arrays."""
    updates = [sending(client, values) for client, values in enumerate(sent)]
    result, clipped = bound(updates, clip_norm_multiple=multiple)
    for key in KEYS:
        senders = [update for update in updates if key in update.tensors]
        norms = [norm(update, key) for update in senders]
        if len(updates) < 3 or not multiple:
            assert all(result[u.client].tensors is u.tensors for u in senders)
        elif len(senders) >= 3:
            median = median_low(norms)
            for update, before in zip(senders, norms, strict=True):
                after = result[update.client]
                if before <= multiple * median:
                    assert after.tensors[key] is update.tensors[key]
                else:
                    assert norm(after, key) == pytest.approx(median, rel=1e-5, abs=1e-4)
                    assert clipped[update.client] <= median / before
    untouched = [update for update in updates if update.client not in clipped]
    assert all(result[update.client] is update for update in untouched)


def test_a_layer_of_two_clients_is_compared_with_the_typical_change() -> None:
    """Typical are changes of 1; of the two that sent layer 3, one is a hundred times as large."""
    updates = [
        sending(0, {0: 1.0, 1: 1.0}),
        sending(1, {0: 1.0, 1: 1.0}),
        sending(2, {0: 1.0, 3: 1.0}),
        sending(3, {0: 1.0, 1: 1.0, 3: 100.0}),
    ]
    result, clipped = bound(updates)
    assert clipped == {3: pytest.approx(1 / 100)}
    np.testing.assert_allclose(result[3].tensors[3]["layer.3.A"], 2.0)
    assert result[2] is updates[2]


def test_two_updates_are_not_clipped_and_each_counts_at_most_twice_the_other() -> None:
    updates = [
        sending(0, {0: 1.0}),
        replace(sending(1, {0: 100.0}), targets=1000),
        Failure(2, "asleep"),
    ]
    instructions = [instruction_for(client) for client in range(3)]
    result, bounds = bounded(settings(), MODEL, instructions, updates)
    assert (bounds.clipped, bounds.limited) == ({}, (1,))
    assert result == [updates[0], replace(updates[1], targets=16), updates[2]]


def test_a_value_that_was_not_sent_is_compared_with_the_servers() -> None:
    """Such as one of a layer that was personal so far; without one of its shape it is a change."""
    instruction = replace(instruction_for(0), tensors={})
    like = np.full(2, 4.0, np.float32)
    assert change_of(instruction, MODEL, 0, "layer.0.A", like).tolist() == [3.0, 3.0]
    assert change_of(instruction, MODEL, 0, "layer.0.A", like[:1]).tolist() == [4.0]
    assert change_of(instruction, MODEL, 9, "new", like).tolist() == [4.0, 4.0]


def test_the_largest_floats_are_clipped_exactly() -> None:
    updates = [sending(client, {0: 1.0, HEAD: 1.0}) for client in range(4)]
    updates.append(sending(4, {0: 3.4e38, HEAD: -3.4e38}))
    result, _ = bound(updates)
    np.testing.assert_allclose(result[4].tensors[0]["layer.0.A"], 2.0)
    np.testing.assert_allclose(result[4].tensors[HEAD]["head.W"], 0.0, atol=1e-9)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=9), st.sampled_from((0.0, 2.0)))
def test_a_weight_is_at_most_twice_the_median(weights: list[int], multiple: float) -> None:
    updates = [
        replace(sending(client, {0: 1.0}), targets=weight) for client, weight in enumerate(weights)
    ]
    instructions = [instruction_for(update.client) for update in updates]
    result, bounds = bounded(settings(max_weight_multiple=multiple), MODEL, instructions, updates)
    most = 2 * median_low(weights) if multiple and len(weights) > 1 else 10**12
    for before, after in zip(updates, result, strict=True):
        assert isinstance(after, Update)
        assert after.targets == min(before.targets, most)
        assert (after is not before) == (after.client in bounds.limited) == (before.targets > most)
