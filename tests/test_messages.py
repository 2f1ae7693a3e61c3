"""Functions of messages: flatten, restrict, payload_bytes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.messages.reply import Failure
from droppeft.messages.tensors import HEAD, OTHER, Tensors, flatten, payload_bytes, restrict

NAMES = ["lora_A", "lora_B", "weight", "bias"]
arrays = st.builds(
    np.zeros,
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from([np.float16, np.float32, np.int64]),
)
keys = st.one_of(st.integers(0, 5), st.sampled_from([HEAD, OTHER]))
trees = st.dictionaries(keys, st.dictionaries(st.sampled_from(NAMES), arrays, max_size=4))
name_sets = st.frozensets(st.sampled_from(NAMES))


def small_tree() -> Tensors:
    return {
        0: {"lora_A": np.ones((2, 3), np.float32), "lora_B": np.ones((3, 2), np.float32)},
        1: {"lora_A": np.ones((2, 3), np.float32)},
        HEAD: {"weight": np.ones((4, 3), np.float16)},
    }


def test_flatten_keeps_the_order_of_the_tree() -> None:
    order = [(key, name) for key, name, _ in flatten(small_tree())]
    assert order == [(0, "lora_A"), (0, "lora_B"), (1, "lora_A"), (HEAD, "weight")]


def test_payload_is_elements_times_width() -> None:
    # Three float32 arrays of 6 elements (72 bytes) and 12 elements of float16 (24 bytes).
    assert payload_bytes(small_tree()) == 72 + 24


def test_payload_of_nothing_is_nothing() -> None:
    assert payload_bytes({}) == 0
    assert payload_bytes({0: {}}) == 0


def test_payload_counts_a_view_by_its_own_size() -> None:
    assert payload_bytes({0: {"w": np.zeros(100, np.float32)[:10]}}) == 40


def test_restrict_keeps_the_named_tensors_and_drops_empty_layers() -> None:
    selected = restrict(small_tree(), frozenset({"lora_B", "weight"}))
    assert {key: set(named) for key, named in selected.items()} == {0: {"lora_B"}, HEAD: {"weight"}}


def test_restrict_ignores_names_that_are_not_there() -> None:
    assert restrict(small_tree(), frozenset({"absent"})) == {}


def test_restrict_copies_no_array_and_does_not_change_its_input() -> None:
    tree = small_tree()
    selected = restrict(tree, frozenset({"lora_A"}))
    assert selected[0]["lora_A"] is tree[0]["lora_A"]
    assert set(tree[0]) == {"lora_A", "lora_B"}
    assert HEAD in tree


@given(trees, name_sets)
def test_restrict_keeps_exactly_what_is_named(tree: Tensors, names: frozenset[str]) -> None:
    expected = [(key, name, id(a)) for key, name, a in flatten(tree) if name in names]
    selected = restrict(tree, names)
    assert [(key, name, id(a)) for key, name, a in flatten(selected)] == expected
    assert all(selected.values())


@given(trees, name_sets)
def test_selected_and_other_tensors_add_up_to_all(tree: Tensors, names: frozenset[str]) -> None:
    rest = frozenset(NAMES) - names
    parts = payload_bytes(restrict(tree, names)) + payload_bytes(restrict(tree, rest))
    assert parts == payload_bytes(tree)


@given(trees, name_sets, name_sets)
def test_restricting_twice_is_restricting_to_both(
    tree: Tensors, one: frozenset[str], other: frozenset[str]
) -> None:
    twice = [(k, n) for k, n, _ in flatten(restrict(restrict(tree, one), other))]
    assert twice == [(k, n) for k, n, _ in flatten(restrict(tree, one & other))]


def test_messages_are_frozen() -> None:
    failure = Failure(client=1, reason="lost")
    with pytest.raises(dataclasses.FrozenInstanceError):
        failure.client = 2
