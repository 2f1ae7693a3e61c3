"""What the methods that compute with LoRA's A and B have in common."""

from collections.abc import Iterable, Mapping
from hashlib import sha256

import numpy as np

from droppeft.adapters.tensor_names import LORA_A, backbone_name
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import BaseDelta
from droppeft.messages.tensors import Array
from droppeft.sharing.aggregation import Wide


def check_exact_weights(config: Config) -> None:
    """Refuse weights to which products B·A cannot be added: quantised ones, and bf16 or fp16.

    Half precision would round most of a product away: it resolves 1/256 of a weight.

    Raises:
        DroppeftError: if the weights are quantised or not in fp32.
    """
    precision = config.training.precision
    if precision != "fp32":
        raise DroppeftError(
            f"method={config.method} adds to the frozen weights less than {precision} resolves; "
            "set training.precision=fp32"
        )
    if config.quantization != "none":
        raise DroppeftError(
            f"method={config.method} adds to the frozen weights, which is not possible with "
            f"quantization={config.quantization}; set quantization=none"
        )


def scale_of(config: Config) -> float:
    """The factor of a product B·A in the layer: alpha / rank."""
    assert config.adapter.alpha is not None
    assert config.adapter.rank is not None
    return config.adapter.alpha / config.adapter.rank


def with_added(
    delta: BaseDelta | None, products: Iterable[tuple[str, Wide]], scale: float
) -> BaseDelta | None:
    """The base delta plus ``scale`` times the products, in float32.

    Args:
        products: pairs of the name of an A and its product (out, in). They are consumed one by
            one, so that a single product is in memory at a time.
    """
    before = dict(delta.tensors) if delta else {}
    after: dict[str, Array] = {}
    for a, product in products:
        name = backbone_name(a.partition(LORA_A)[0] + ".weight")
        total = scale * product + np.asarray(before.get(name, 0.0), np.float64)
        after[name] = total.astype(np.float32)
    if not after:
        return delta
    tensors = {**before, **after}
    return BaseDelta(_version(tensors), tensors)


def _version(tensors: Mapping[str, Array]) -> str:
    """A hash of names and values; cached states of the backbone are stored under it."""
    digest = sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()[:16]
