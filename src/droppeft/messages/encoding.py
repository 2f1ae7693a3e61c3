"""Tensors in fewer bytes on the network: bf16, or 8 bits per value.

``int8`` has one scale for each block of values, as in Dettmers et al. (arXiv:2110.02861, section
2.1), with linear codes. What rounding loses is kept by the sender and added to its next message:
error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv:1901.09847). Which
values are sent as changes is ours; see :mod:`droppeft.transports.encoding`.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from droppeft.messages.tensors import Array, LayerKey, Layout, Tensors, flatten

Encoding = Literal["fp32", "bf16", "int8"]
"""How the values of a tensor travel."""

BLOCK = 256
"""Values that share a scale."""

_LARGEST_CODE = 127

Shape = tuple[int, ...]
Floats = npt.NDArray[np.float32]


def encode(array: Array, encoding: Encoding) -> Array:
    """Encode float32 values.

    Returns:
        The array itself (``fp32``), the upper halves of its values, rounded to nearest even, as
        uint16 of the same shape (``bf16``), or a flat uint8 array of :func:`encoded_bytes` bytes
        with all scales before all codes (``int8``).
    """
    if encoding == "fp32":
        return array
    values = np.asarray(array, dtype=np.float32, order="C")
    return _to_bf16(values) if encoding == "bf16" else _to_int8(values)


def decode(array: Array, encoding: Encoding, shape: Shape) -> Floats:
    """Return the float32 values of an encoded tensor of a shape.

    Raises:
        ValueError: the array is no encoded tensor of this shape.
    """
    if encoding == "fp32":
        return array.astype(np.float32, copy=False)
    count = int(np.prod(shape, dtype=np.int64))
    kind, expected = (
        (np.uint16, shape) if encoding == "bf16" else (np.uint8, (encoded_bytes(count, "int8"),))
    )
    if array.dtype != kind or array.shape != expected:
        raise ValueError(f"{array.dtype}{list(array.shape)} is no {encoding} of {list(shape)}")
    if encoding == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return _from_int8(array, count).reshape(shape)


def encoded_bytes(values: int, encoding: Encoding) -> int:
    """Return the bytes of so many encoded values of one tensor."""
    if encoding == "int8":
        return values + 4 * _blocks(values)
    return values * (4 if encoding == "fp32" else 2)


def decode_tensors(tensors: Tensors, encoding: Encoding, layout: Layout) -> Tensors:
    """Decode tensors; those that the layout does not have stay as they are.

    Raises:
        ValueError: a tensor is not in this encoding, or has another shape.
    """
    decoded: dict[LayerKey, dict[str, Array]] = {}
    for key, name, array in flatten(tensors):
        value = decode(array, encoding, layout[name][1]) if name in layout else array
        decoded.setdefault(key, {})[name] = value
    return decoded


def tensor_bytes(tensors: Tensors, encoding: Encoding) -> int:
    """Return the bytes that tensors have when they travel, without overhead of a transport."""
    return sum(encoded_bytes(array.size, encoding) for _, _, array in flatten(tensors))


def _to_bf16(values: Floats) -> Array:
    bits = values.view(np.uint32)
    # In 64 bits, so that a value near the largest number rounds to infinity and not to -0.
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint64(0x7FC0), rounded).astype(np.uint16)


def _to_int8(values: Floats) -> Array:
    blocks = np.zeros((_blocks(values.size), BLOCK), dtype=np.float32)
    blocks.reshape(-1)[: values.size] = values.reshape(-1)
    with np.errstate(invalid="ignore"):  # values that are not finite give scales that are not
        scales = np.abs(blocks).max(axis=1) / np.float32(_LARGEST_CODE)
        codes = np.rint(blocks / np.where(scales == 0, np.float32(1), scales)[:, None])
    codes = np.nan_to_num(codes).astype(np.int8).reshape(-1)[: values.size]
    return np.concatenate([scales.view(np.uint8), codes.view(np.uint8)])


def _from_int8(array: Array, count: int) -> Floats:
    blocks = _blocks(count)
    scales = np.frombuffer(array[: 4 * blocks].tobytes(), dtype="<f4").astype(np.float32)
    codes = array[4 * blocks :].view(np.int8).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # scales from the network may be infinite
        values: Floats = codes * np.repeat(scales, BLOCK)[:count]
    return values


def _blocks(values: int) -> int:
    return -(-values // BLOCK)
