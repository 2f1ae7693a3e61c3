"""Safetensors files of arrays and JSON values, with a checksum over both; no pickle.

Ours.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from droppeft.messages.tensors import Array

DAMAGES = (OSError, SafetensorError, ValueError, KeyError, TypeError)
"""Exceptions that reading a damaged file may raise."""


def encode_checked(arrays: Mapping[str, Array], head: Mapping[str, Any]) -> bytes:
    """Return the content of a file.

    Args:
        arrays: by name; :func:`decode_checked` returns them in the same order.
        head: JSON values that are stored with them.
    """
    dense = {label: np.asarray(array, order="C") for label, array in arrays.items()}
    text = json.dumps({**head, "order": list(dense)})
    header = {"head": text, "sha256": _digest(text, dense)}
    content: bytes = safetensors.numpy.save(dense, header)
    return content


def decode_checked(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return arrays and JSON values of a file with the content of :func:`encode_checked`.

    Raises:
        Exception: the file is missing or damaged; one of :data:`DAMAGES`.
    """
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        text = metadata["head"]
        head = json.loads(text)
        arrays = {label: file.get_tensor(label) for label in head.pop("order")}
    if _digest(text, arrays) != metadata["sha256"]:
        raise ValueError("its checksum does not match")
    return arrays, head


def _digest(text: str, arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(text.encode())
    for label, array in arrays.items():
        digest.update(f"{label}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
