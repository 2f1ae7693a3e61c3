"""What methods have in common that calculate with LoRA's matrices."""

from collections.abc import Iterable, Mapping
from hashlib import sha256

import numpy as np

from droppeft.adapters.by_layer import backbone_name
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.messages import Array, BaseDelta
from droppeft.sharing.aggregation import Wide
from droppeft.sharing.factors import A


def check_plain_lora(config: Config) -> None:
    """Refuse an adapter that is not LoRA as first described.

    Raises:
        DroppeftError: another type, or options that change what a product means.
    """
    chosen, method = config.adapter, f"method={config.method}"
    if chosen.type != "lora" or chosen.rank is None:
        raise DroppeftError(
            f"{method} calculates with LoRA's A and B, and adapter.type={chosen.type} has none; "
            "set adapter.type=lora"
        )
    if chosen.options:
        raise DroppeftError(
            f"{method} knows plain LoRA alone; leave adapter.options.{min(chosen.options)} out"
        )


def check_added_lora(config: Config) -> None:
    """Refuse what a method cannot have that adds products of plain LoRA to the frozen weights.

    Raises:
        DroppeftError: as :func:`check_plain_lora`, or weights that nothing can be added to.
    """
    check_plain_lora(config)
    if config.quantization != "none":
        raise DroppeftError(
            f"method={config.method} adds to the frozen weights, which "
            f"quantization={config.quantization} does not allow; set quantization=none"
        )


def scale_of(config: Config) -> float:
    """What a product B·A counts in the layer: alpha / rank."""
    assert config.adapter.alpha is not None
    assert config.adapter.rank is not None
    return config.adapter.alpha / config.adapter.rank


def with_added(
    delta: BaseDelta | None, products: Iterable[tuple[str, Wide]], scale: float
) -> BaseDelta | None:
    """The delta and ``scale`` times the products, each with the name of its A; float32.

    One product at a time is in memory.
    """
    before = dict(delta.tensors) if delta else {}
    after: dict[str, Array] = {}
    for a, product in products:
        name = backbone_name(a.partition(A)[0] + ".weight")
        sum_of_both = scale * product + np.asarray(before.get(name, 0.0), np.float64)
        after[name] = sum_of_both.astype(np.float32)
    if not after:
        return delta
    tensors = {**before, **after}
    return BaseDelta(_content(tensors), tensors)


def _content(tensors: Mapping[str, Array]) -> str:
    """Names the values: what is kept of the backbone is told apart by it."""
    found = sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].tobytes())
    return found.hexdigest()[:16]
