"""Arrays and a text in one safetensors file with a checksum over both; nothing is ever unpickled.

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

from droppeft.messages import Array

DAMAGES = (OSError, SafetensorError, ValueError, KeyError, TypeError)
"""What reading a damaged file may raise."""


def encode_checked(arrays: Mapping[str, Array], head: Mapping[str, Any]) -> bytes:
    """Content of a file; arrays come back in the same order.

    Args:
        head: JSON.
    """
    dense = {label: np.asarray(array, order="C") for label, array in arrays.items()}
    text = json.dumps({**head, "order": list(dense)})
    header = {"head": text, "sha256": _digest(text, dense)}
    content: bytes = safetensors.numpy.save(dense, header)
    return content


def decode_checked(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what :func:`encode_checked` made.

    Raises:
        Exception: one of :data:`DAMAGES`.
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
