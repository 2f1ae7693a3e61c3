import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.messages.reply import MeasuredCost, Update
from droppeft.messages.tensors import HEAD, Array, LayerKey, Tensors, flatten
from droppeft.sharing.aggregation import Weight, average_over_senders, by_targets

SHAPES: dict[LayerKey, dict[str, tuple[int, ...]]] = {
    0: {"0.A": (2, 3), "0.B": (3, 2)},
    1: {"1.A": (2, 3)},
    HEAD: {"head.weight": (2,), "head.bias": ()},
}
NAMES = [(key, name) for key, named in SHAPES.items() for name in named]


def filled(values: np.random.Generator) -> dict[LayerKey, dict[str, Array]]:
    return {
        key: {name: np.float32(values.normal(size=shape)) for name, shape in named.items()}
        for key, named in SHAPES.items()
    }


def update(client: int, tensors: Tensors) -> Update:
    cost = MeasuredCost(0.0, 0.0, 0.0, 0, 0, 0, (), (), 0)
    return Update(1, client, "", tensors, 1, 1, 1, (1, 1), (0.0, 0.0), 0.0, None, cost)


def of(weights: Sequence[float]) -> Weight:
    """A weight for every client, by its number."""
    return lambda update, layer: weights[update.client]


def only(tensors: Tensors, names: set[tuple[LayerKey, str]]) -> Tensors:
    selected: dict[LayerKey, dict[str, Array]] = {}
    for key, name, array in flatten(tensors):
        if (key, name) in names:
            selected.setdefault(key, {})[name] = array
    return selected


def bits(tensors: Tensors) -> dict[tuple[LayerKey, str], tuple[str, tuple[int, ...], bytes]]:
    return {
        (key, name): (array.dtype.str, array.shape, array.tobytes())
        for key, name, array in flatten(tensors)
    }


coverages = st.lists(st.sets(st.sampled_from(NAMES)), max_size=5)


@given(coverages, st.integers(0, 2**32), st.data())
def test_every_tensor_is_the_weighted_mean_over_its_holders(
    coverage: list[set[tuple[LayerKey, str]]], seed: int, data: st.DataObject
) -> None:
    values = np.random.default_rng(seed)
    current = filled(values)
    updates = [update(client, only(filled(values), names)) for client, names in enumerate(coverage)]
    weight = st.integers(0, 3) | st.floats(0.0, 1e3, allow_subnormal=False)
    weights = [data.draw(weight) for _ in updates]
    merged = average_over_senders(current, updates, of(weights))
    assert bits(merged).keys() == bits(current).keys()
    for key, name in NAMES:
        holders = [
            (float(weight), u.tensors[key][name])
            for u, weight, names in zip(updates, weights, coverage, strict=True)
            if (key, name) in names and weight > 0
        ]
        result = merged[key][name]
        assert (result.dtype, result.shape) == (np.dtype(np.float32), SHAPES[key][name])
        if not holders:
            assert result.tobytes() == current[key][name].tobytes()
            continue
        total = math.fsum(weight for weight, _ in holders)
        for place in np.ndindex(result.shape):
            expected = math.fsum(weight * float(array[place]) for weight, array in holders) / total
            assert float(result[place]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(coverages, st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_result_does_not_depend_on_the_order_of_arrival(
    coverage: list[set[tuple[LayerKey, str]]], seed: int, shuffle: random.Random
) -> None:
    values = np.random.default_rng(seed)
    current = filled(values)
    updates = [update(client, only(filled(values), names)) for client, names in enumerate(coverage)]
    weights = list(values.uniform(0.1, 5.0, len(updates)))
    arrived = list(updates)
    shuffle.shuffle(arrived)
    in_instruction_order = sorted(arrived, key=lambda each: each.client)
    first = average_over_senders(current, updates, of(weights))
    second = average_over_senders(current, in_instruction_order, of(weights))
    assert bits(first) == bits(second)


def test_sums_run_in_double_precision() -> None:
    """In float32 1e8 + 1 is 1e8, so the mean would be 0; it is 2 / 4."""
    current: Tensors = {0: {"x": np.zeros(1, dtype=np.float32)}}
    updates = [
        update(client, {0: {"x": np.array([value], dtype=np.float32)}})
        for client, value in enumerate((1e8, 1.0, 1.0, -1e8))
    ]
    assert average_over_senders(current, updates, by_targets)[0]["x"].tolist() == [0.5]


def test_one_client_with_one_layer_changes_that_layer_alone() -> None:
    values = np.random.default_rng(0)
    current, trained = filled(values), filled(values)
    merged = average_over_senders(current, [update(3, {1: trained[1]})], by_targets)
    expected = {**current, 1: trained[1]}
    assert bits(merged) == bits(expected)


def test_tensors_that_no_client_shared_keep_their_bits() -> None:
    """Including bits that arithmetic would change: negative zero, and the payload of a NaN."""
    odd = np.array([0x80000000, 0x7FC12345], dtype=np.uint32).view(np.float32)
    current: Tensors = {0: {"x": odd}, 1: {"y": np.ones(2, dtype=np.float32)}}
    shared: Tensors = {1: {"y": np.zeros(2, dtype=np.float32)}}
    merged = average_over_senders(current, [update(0, shared)], by_targets)
    assert merged[0]["x"].tobytes() == odd.tobytes()
    assert merged[1]["y"].tolist() == [0.0, 0.0]
    assert bits(average_over_senders(current, [], by_targets)) == bits(current)


def test_an_update_with_weight_0_does_not_count() -> None:
    current: Tensors = {0: {"x": np.array([7.0], dtype=np.float32)}}
    # Otherwise 0 · inf would make the sum NaN.
    without_weight = update(0, {0: {"x": np.array([np.inf], dtype=np.float32)}})
    with_weight = update(1, {0: {"x": np.array([3.0], dtype=np.float32)}})
    assert average_over_senders(current, [without_weight, with_weight], of([0, 5]))[0][
        "x"
    ].tolist() == [3.0]
    assert average_over_senders(current, [without_weight], of([0]))[0]["x"].tolist() == [7.0]


def test_the_inputs_are_not_changed() -> None:
    values = np.random.default_rng(0)
    current, first, second = filled(values), filled(values), filled(values)
    before = bits(current), bits(first), bits(second)
    average_over_senders(current, [update(0, first), update(1, second)], of([1, 3]))
    assert (bits(current), bits(first), bits(second)) == before
