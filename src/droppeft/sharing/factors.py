"""LoRA's factors as what they stand for: products B·A, and what averaging the factors gets wrong.

Averaging A and B by themselves gives mean(B)·mean(A), which is not mean(B·A). Three ways out:
FlexLoRA (arXiv:2402.11505) factors the mean product again by SVD and loses what the rank cannot
hold; FLoRA (arXiv:2409.05976) and FedEx-LoRA (arXiv:2410.09432) put what the factors cannot hold
into the frozen weights. All by layer over its holders, which is ours.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from droppeft.messages import Array, LayerKey, Tensors, Update, flatten
from droppeft.sharing.aggregation import Weight, Wide, average_over_holders

A, B = ".lora_A.", ".lora_B."


def pairs_of(tensors: Tensors) -> Iterator[tuple[LayerKey, str, str]]:
    """Yield (layer, name of A, name of B) of every LoRA that has both."""
    for key, a, _ in flatten(tensors):
        if A in a and a.replace(A, B) in tensors[key]:
            yield key, a, a.replace(A, B)


def average_products(current: Tensors, updates: Sequence[Update], weight: Weight) -> Tensors:
    """Weighted mean of every B·A over the updates that have both; of all else, of the tensors.

    The mean of products has more rank than one of them: what is cut off is lost, and of all
    matrices of that rank this is the nearest (FlexLoRA). A's rows and B's columns are in the order
    of what they contribute, so that cutting them further is best, too.

    Args:
        as :func:`~droppeft.sharing.aggregation.average_over_holders`.
    """
    merged: dict[LayerKey, dict[str, Array]] = {
        key: dict(named) for key, named in average_over_holders(current, updates, weight).items()
    }
    for key, a, b in pairs_of(current):
        holders = _holders(key, a, b, updates, weight)
        if holders:
            merged[key][a], merged[key][b] = _nearest(holders, rank=len(current[key][a]))
    return merged


def mean_products(
    current: Tensors, updates: Sequence[Update], weight: Weight
) -> Iterator[tuple[str, Wide]]:
    """Yield the weighted mean of each B·A (out, in) over its holders, if any, and the name of A.

    Args:
        as :func:`average_products`.
    """
    for key, a, b in pairs_of(current):
        holders = _holders(key, a, b, updates, weight)
        if holders:
            down, up = _stacked(holders)
            yield a, up @ down


def _holders(
    key: LayerKey, a: str, b: str, updates: Sequence[Update], weight: Weight
) -> list[tuple[Array, Array, float]]:
    return [
        (update.tensors[key][a], update.tensors[key][b], weight(update, key))
        for update in updates
        if {a, b} <= update.tensors.get(key, {}).keys() and weight(update, key) > 0
    ]


def _stacked(holders: Sequence[tuple[Array, Array, float]]) -> tuple[Wide, Wide]:
    """(K·r, in) and (out, K·r) whose product is the weighted mean of K products, exactly."""
    total = sum(weight for _, _, weight in holders)
    down = np.concatenate([a.astype(np.float64) for a, _, _ in holders])
    up = [b.astype(np.float64) * (weight / total) for _, b, weight in holders]
    return down, np.concatenate(up, axis=1)


def _nearest(holders: Sequence[tuple[Array, Array, float]], rank: int) -> tuple[Array, Array]:
    """A (r, in) and B (out, r) nearest to the mean product.

    A's rows are orthogonal and as long as those of the clients on average, B has the rest: where
    the product has less rank than r, A stays what a gradient can start from.
    """
    down, up = _stacked(holders)
    left, small_up = np.linalg.qr(up)
    right, small_down = np.linalg.qr(down.T)
    u, sizes, v = np.linalg.svd(small_up @ small_down.T)
    squares = (down**2).sum(axis=1)
    rows = max(np.count_nonzero(squares), 1)  # smaller ranks are padded with zeros
    length = float(np.sqrt(squares.sum() / rows)) or 1.0
    found = min(rank, len(sizes))  # a map smaller than its rank has no more
    first, second = np.zeros((rank, down.shape[1])), np.zeros((len(up), rank))
    first[:found] = (v[:found] @ right.T) * length
    second[:, :found] = (left @ u[:, :found]) * (sizes[:found] / length)
    return first.astype(np.float32), second.astype(np.float32)
