"""Averages of LoRA's products B·A instead of its factors A and B.

Averaging A and B separately gives mean(B)·mean(A), which differs from mean(B·A). FlexLoRA
(arXiv:2402.11505) factors the mean product by SVD and discards what exceeds the rank. FLoRA
(arXiv:2409.05976) and FedEx-LoRA (arXiv:2410.09432) add what the factors cannot represent to the
frozen weights. Averaging each layer over the clients that sent it is ours.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from droppeft.adapters.tensor_names import LORA_A, LORA_B
from droppeft.messages.reply import Update
from droppeft.messages.tensors import Array, LayerKey, Tensors, flatten
from droppeft.sharing.aggregation import Weight, Wide, average_over_senders


def pairs_of(tensors: Tensors) -> Iterator[tuple[LayerKey, str, str]]:
    """Yield (layer, name of A, name of B) of every LoRA that has both."""
    for key, a, _ in flatten(tensors):
        if LORA_A in a and a.replace(LORA_A, LORA_B) in tensors[key]:
            yield key, a, a.replace(LORA_A, LORA_B)


def average_products(current: Tensors, updates: Sequence[Update], weight: Weight) -> Tensors:
    """Return the weighted mean of every B·A over the updates that have both factors.

    The mean product has a higher rank than a single one, so it is replaced by the nearest matrix of
    the rank of A and B (FlexLoRA). A's rows and B's columns are sorted by their contribution, so
    that truncating them further is also optimal. All other tensors are averaged.

    The arguments are those of :func:`~droppeft.sharing.aggregation.average_over_senders`.
    """
    merged: dict[LayerKey, dict[str, Array]] = {
        key: dict(named) for key, named in average_over_senders(current, updates, weight).items()
    }
    for key, a, b in pairs_of(current):
        holders = _holders(key, a, b, updates, weight)
        if holders:
            merged[key][a], merged[key][b] = _nearest(holders, rank=len(current[key][a]))
    return merged


def mean_products(
    current: Tensors, updates: Sequence[Update], weight: Weight
) -> Iterator[tuple[str, Wide]]:
    """Yield (name of A, weighted mean of B·A (out, in)) for each LoRA that an update contains.

    The arguments are those of :func:`~droppeft.sharing.aggregation.average_over_senders`.
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
    """Return down (K·r, in) and up (out, K·r); up · down is the weighted mean of K products."""
    total = sum(weight for _, _, weight in holders)
    down = np.concatenate([a.astype(np.float64) for a, _, _ in holders])
    up = [b.astype(np.float64) * (weight / total) for _, b, weight in holders]
    return down, np.concatenate(up, axis=1)


def _nearest(holders: Sequence[tuple[Array, Array, float]], rank: int) -> tuple[Array, Array]:
    """Return the A (r, in) and B (out, r) whose product is nearest to the mean product.

    A's rows are orthogonal, with the root mean square length of the clients' rows; B contains the
    singular values. So A is not 0 where the product has a lower rank than r, and can be trained on.
    """
    down, up = _stacked(holders)
    left, small_up = np.linalg.qr(up)
    right, small_down = np.linalg.qr(down.T)
    u, sizes, v = np.linalg.svd(small_up @ small_down.T)
    squares = (down**2).sum(axis=1)
    rows = max(np.count_nonzero(squares), 1)  # smaller ranks are padded with zeros
    length = float(np.sqrt(squares.sum() / rows)) or 1.0
    available = min(rank, len(sizes))  # a small matrix has fewer singular values than r
    first, second = np.zeros((rank, down.shape[1])), np.zeros((len(up), rank))
    first[:available] = (v[:available] @ right.T) * length
    second[:, :available] = (left @ u[:, :available]) * (sizes[:available] / length)
    return first.astype(np.float32), second.astype(np.float32)
