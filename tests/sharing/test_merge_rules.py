"""Median, trimmed mean, Krum and multi-Krum, beside references that are written out."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import ServerConfig
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.reply import Failure, Update
from droppeft.messages.server_state import GlobalModel
from droppeft.messages.tensors import HEAD, Array, LayerKey, Tensors, flatten
from droppeft.sharing.aggregation import average_over_senders, by_targets
from droppeft.sharing.merge_rules import clients_set_aside, combined, distances
from handmade import LAYERS, filled, instruction_for, update_for

MODEL = GlobalModel(AdapterSpec((None,) * LAYERS), filled(1.0))
KEYS: list[LayerKey] = [*range(LAYERS), HEAD]


def combine(updates: list[Update], **settings: Any) -> tuple[list[Any], tuple[int, ...]]:
    instructions = [instruction_for(update.client) for update in updates]
    server = ServerConfig.model_validate(settings)
    set_aside = clients_set_aside(server, MODEL, instructions, updates)
    return combined(server, updates, set_aside), set_aside


def drawn(client: int, keys: set[LayerKey], values: np.random.Generator) -> Update:
    tensors: Tensors = {
        key: {name: values.normal(size=array.shape).astype(np.float32)}
        for key, name, array in flatten(MODEL.tensors)
        if key in keys
    }
    counts = int(values.integers(1, 100))
    return update_for(instruction_for(client), tensors=tensors, examples=counts)


coverages = st.lists(st.sets(st.sampled_from(KEYS), min_size=1), min_size=3, max_size=8)


@given(coverages, st.integers(0, 2**32), st.sampled_from(("median", "trimmed_mean")))
def test_any_weighted_mean_is_then_the_robust_value_over_the_senders(
    coverage: list[set[LayerKey]], seed: int, rule: str
) -> None:
    values = np.random.default_rng(seed)
    updates = [drawn(client, keys, values) for client, keys in enumerate(coverage)]
    result, set_aside = combine(updates, merge=rule, malicious_fraction=0.25)
    merged = average_over_senders(MODEL.tensors, result, by_targets)
    assert set_aside == ()
    assert [reply.tensors.keys() for reply in result] == [u.tensors.keys() for u in updates]
    for key, name, array in flatten(MODEL.tensors):
        sent = [u.tensors[key][name].astype(np.float64) for u in updates if key in u.tensors]
        expected = robust(sent, rule) if sent else array
        np.testing.assert_allclose(merged[key][name], expected, rtol=1e-6)


def robust(sent: list[Array], rule: str) -> Array:
    """The value by the definition: numpy's median, or the mean without a quarter at both ends."""
    if rule == "median":
        return np.median(np.stack(sent), axis=0)
    cut = min(-(-len(sent) // 4), (len(sent) - 1) // 2)
    return np.sort(np.stack(sent), axis=0)[cut : len(sent) - cut].mean(axis=0)


def krum_scores(points: list[Any], malicious: int) -> list[float]:
    """The paper's scores: the sum of squared distances to the n - f - 2 nearest others, or one."""
    scores = []
    for index, point in enumerate(points):
        others = [other for place, other in enumerate(points) if place != index]
        squares = sorted(float(((point - other) ** 2).sum()) for other in others)
        scores.append(sum(squares[: max(1, len(points) - malicious - 2)]))
    return scores


@given(st.integers(3, 9), st.integers(0, 2**32), st.sampled_from(("krum", "multi_krum")))
def test_krum_keeps_what_its_definition_says(count: int, seed: int, rule: str) -> None:
    values = np.random.default_rng(seed)
    updates = [drawn(client, set(KEYS), values) for client in range(count)]
    result, set_aside = combine(updates, merge=rule, malicious_fraction=0.2)
    points = [
        np.concatenate([array for _, _, array in flatten(u.tensors)]).astype(np.float64)
        for u in updates
    ]
    malicious = -(-count // 5)
    scores = krum_scores(points, malicious)
    kept = 1 if rule == "krum" else count - malicious
    best = set(sorted(range(count), key=lambda index: scores[index])[:kept])
    assert {reply.client for reply in result if isinstance(reply, Update)} == best
    assert set(set_aside) == set(range(count)) - best
    assert all(isinstance(result[client], Failure) for client in set_aside)


@given(coverages, st.integers(0, 2**32))
def test_distances_are_those_of_the_common_tensors(
    coverage: list[set[LayerKey]], seed: int
) -> None:
    values = np.random.default_rng(seed)
    updates = [drawn(client, keys, values) for client, keys in enumerate(coverage)]
    received = [(instruction_for(u.client), u) for u in updates]
    found = distances(received, MODEL)
    known = {}
    for one in updates:
        for other in updates:
            common = [
                one.tensors[key][name].astype(np.float64) - other.tensors[key][name]
                for key, name, _ in flatten(one.tensors)
                if key in other.tensors
            ]
            if common:
                known[one.client, other.client] = np.square(np.concatenate(common)).mean()
    for place in np.ndindex(found.shape):
        assert found[place] == pytest.approx(known.get(place, max(known.values())))


def test_matrices_of_different_ranks_are_compared_in_their_common_part() -> None:
    def of_rank(client: int, rank: int, value: float) -> tuple[Instruction, Update]:
        def tensors(value: float) -> Tensors:
            return {0: {"0.lora_A.weight": np.full((rank, 3), value, np.float32)}}

        instruction = instruction_for(client, tensors=tensors(1.0))
        return instruction, update_for(instruction_for(client), tensors=tensors(1.0 + value))

    found = distances([of_rank(0, 4, 1.0), of_rank(1, 2, 1.0), of_rank(2, 8, 3.0)], MODEL)
    assert found.tolist() == [[0, 0, 4], [0, 0, 4], [4, 4, 0]]


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_one_attacker_of_five_has_no_influence_on_equal_clients(rule: str) -> None:
    updates = [update_for(instruction_for(client), 2.0) for client in range(4)]
    updates.append(update_for(instruction_for(4), 1e30))
    result, _ = combine(updates, merge=rule)
    kept = [reply for reply in result if isinstance(reply, Update)]
    merged = average_over_senders(MODEL.tensors, kept, by_targets)
    assert {float(one) for _, _, array in flatten(merged) for one in array} == {2.0}
