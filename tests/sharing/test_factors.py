"""Averages of LoRA's products B·A."""

from typing import Any

import numpy as np
import pytest

from droppeft.messages.reply import MeasuredCost, Update
from droppeft.messages.tensors import HEAD, Tensors
from droppeft.sharing.aggregation import average_over_senders, by_targets
from droppeft.sharing.factors import average_products

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"
RANK, WIDE, HIGH = 3, 10, 7


def layer(rng: np.random.Generator, rank: int = RANK) -> dict[str, Any]:
    return {
        A: rng.normal(size=(rank, WIDE)).astype(np.float32),
        B: rng.normal(size=(HIGH, rank)).astype(np.float32),
        "q.norm": rng.normal(size=2).astype(np.float32),
    }


def update(client: int, tensors: Tensors, examples: int = 1) -> Update:
    cost = MeasuredCost(0.0, 0.0, 0.0, 0, 0, 0, (), (), 0)
    return Update(1, client, "", tensors, examples, examples, 1, (1,), (0.0,), 0.0, None, cost)


def product(tensors: Tensors) -> Any:
    return tensors[0][B].astype(np.float64) @ tensors[0][A].astype(np.float64)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_product_of_a_single_client_is_preserved(rng: np.random.Generator) -> None:
    current, sent = {0: layer(rng)}, {0: layer(rng)}
    merged = average_products(current, [update(0, sent)], by_targets)
    np.testing.assert_allclose(product(merged), product(sent), atol=1e-5)
    np.testing.assert_array_equal(merged[0]["q.norm"], sent[0]["q.norm"])


def test_the_product_is_the_nearest_of_its_rank_to_the_mean_product(
    rng: np.random.Generator,
) -> None:
    current, sent = {0: layer(rng)}, [{0: layer(rng)} for _ in range(3)]
    updates = [update(client, one, client + 1) for client, one in enumerate(sent)]
    mean = sum((place + 1) * product(one) for place, one in enumerate(sent)) / 6
    merged = product(average_products(current, updates, by_targets))
    u, sizes, v = np.linalg.svd(mean)
    np.testing.assert_allclose(merged, (u[:, :RANK] * sizes[:RANK]) @ v[:RANK], atol=1e-4)
    separate = product(average_over_senders(current, updates, by_targets))
    assert np.linalg.norm(merged - mean) < np.linalg.norm(separate - mean)


def test_the_mean_is_over_updates_with_both_factors(rng: np.random.Generator) -> None:
    """Client 1 sends A alone, which has no effect, since A is computed from the products."""
    current, one, other = {0: layer(rng)}, {0: layer(rng)}, {0: layer(rng)}
    part = {0: {A: other[0][A]}, HEAD: {}}
    merged = average_products(current, [update(0, one), update(1, part)], by_targets)
    np.testing.assert_allclose(product(merged), product(one), atol=1e-5)


def test_tensors_that_no_client_sent_keep_their_bits(rng: np.random.Generator) -> None:
    current = {0: layer(rng)}
    merged = average_products(current, [update(0, {})], by_targets)
    assert all(merged[0][name].tobytes() == current[0][name].tobytes() for name in current[0])


def test_a_pair_with_product_0_can_still_be_trained(rng: np.random.Generator) -> None:
    """LoRA begins with B = 0: A must not become 0 too, or no gradient would ever come."""
    sent = {0: {**layer(rng), B: np.zeros((HIGH, RANK), np.float32)}}
    merged = average_products({0: layer(rng)}, [update(0, sent)], by_targets)
    assert not merged[0][B].any()
    lengths = np.linalg.norm(merged[0][A], axis=1)
    np.testing.assert_allclose(lengths, np.sqrt((sent[0][A] ** 2).sum() / RANK), rtol=1e-5)


def test_a_rank_above_the_size_of_the_matrix(rng: np.random.Generator) -> None:
    sent = {0: layer(rng, rank=12)}
    merged = average_products({0: layer(rng, rank=12)}, [update(0, sent)], by_targets)
    assert merged[0][A].shape == (12, WIDE)
    np.testing.assert_allclose(product(merged), product(sent), atol=1e-4)
