"""Trainable tensors by layer. Ours."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

LayerKey = int | str
"""Where a trainable tensor belongs: a layer index (0 is nearest the input), ``"head"`` (the task
head) or ``"other"`` (trainable but not part of a layer, such as a soft prompt)."""

HEAD: LayerKey = "head"
OTHER: LayerKey = "other"

Tensors = Mapping[LayerKey, Mapping[str, Array]]
"""Trainable tensors by layer, then by parameter name."""

Layout = Mapping[str, tuple[LayerKey, tuple[int, ...]]]
"""The trainable tensors of an adapter, without values: parameter name to (layer, shape)."""


def layer_key(text: str) -> LayerKey:
    """Return the layer key for its text form; the inverse of ``str``."""
    return int(text) if text.isdigit() else text


def flatten(tensors: Tensors) -> Iterator[tuple[LayerKey, str, Array]]:
    """Yield (layer, name, array) in the order of the mappings."""
    for key, named in tensors.items():
        for name, array in named.items():
            yield key, name, array


def payload_bytes(tensors: Tensors) -> int:
    """Return the bytes of the arrays, without the overhead of a transport."""
    return sum(array.nbytes for _, _, array in flatten(tensors))


def restrict(tensors: Tensors, names: frozenset[str]) -> Tensors:
    """Return the named tensors only; a layer that has none of them is left out."""
    selected = {
        key: {name: array for name, array in named.items() if name in names}
        for key, named in tensors.items()
    }
    return {key: named for key, named in selected.items() if named}
