"""Merge LoRA's factors as what they stand for: the mean of the products, cut to their rank.

Source: FlexLoRA (arXiv:2402.11505) averages products and factors them again by SVD; by layer over
its holders, ours. The mean of products has more rank than one of them: what is cut off is lost, and
of all matrices of that rank this is the nearest. Averaging A and B by themselves is not even that.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from droppeft.plans import Array, LayerKey, Tensors, Update
from droppeft.sharing.aggregation import Weight, average_over_holders

A, B = ".lora_A.", ".lora_B."


def average_products(current: Tensors, updates: Sequence[Update], weight: Weight) -> Tensors:
    """Weighted mean of every B·A over the updates that have both; of all else, of the tensors.

    Args:
        as :func:`~droppeft.sharing.aggregation.average_over_holders`.
    """
    merged = average_over_holders(current, updates, weight)
    return {
        key: {**named, **_pairs_of_layer(named, key, updates, weight)}
        for key, named in merged.items()
    }


def _pairs_of_layer(
    named: Mapping[str, Array], key: LayerKey, updates: Sequence[Update], weight: Weight
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for a in (name for name in named if A in name):
        b = a.replace(A, B)
        holders = [
            (update.tensors[key][a], update.tensors[key][b], weight(update, key))
            for update in updates
            if {a, b} <= update.tensors.get(key, {}).keys() and weight(update, key) > 0
        ]
        if b in named and holders:
            found[a], found[b] = _mean_product(holders)
    return found


def _mean_product(holders: Sequence[tuple[Array, Array, float]]) -> tuple[Array, Array]:
    """A (r, in) and B (out, r) nearest to the mean product.

    A's rows are orthogonal and as long as those of the devices on average, B has the rest: where
    the product has less rank than r, A stays what a gradient can start from.
    """
    total = sum(weight for _, _, weight in holders)
    rank = len(holders[0][0])
    down = np.concatenate([a.astype(np.float64) for a, _, _ in holders])
    up = np.concatenate(
        [b.astype(np.float64) * (weight / total) for _, b, weight in holders], axis=1
    )
    left, small_up = np.linalg.qr(up)
    right, small_down = np.linalg.qr(down.T)
    u, sizes, v = np.linalg.svd(small_up @ small_down.T)
    length = float(np.sqrt((down**2).sum() / len(down))) or 1.0
    found = min(rank, len(sizes))  # a map smaller than its rank has no more
    first, second = np.zeros((rank, down.shape[1])), np.zeros((len(up), rank))
    first[:found] = (v[:found] @ right.T) * length
    second[:, :found] = (left @ u[:, :found]) * (sizes[:found] / length)
    return first.astype(np.float32), second.astype(np.float32)
