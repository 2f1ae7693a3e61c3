"""A hash of a backbone's weights, which is computed once for the same files. Ours."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from droppeft.data.cache import remembered

_HASH = re.compile(r"[0-9a-f]{16}")


def hash_weights(model: nn.Module, heads: Collection[str]) -> str:
    """Hash names, shapes and all values of a model's weights: 16 hexadecimal digits.

    The same weights have the same hash on every machine, and in every data type that holds them
    exactly: the values are hashed in fp32. Another quantisation gives another hash. Of quantised
    weights the codes are hashed and the scales are not, because processors round the mean of the
    scales differently.

    It takes about a second per gigabyte.

    Args:
        model: of transformers.
        heads: names of modules that are left out, since their values follow from the seed.
    """
    digest = hashlib.sha256()
    for name, value in _weights(model, heads):
        exact = value.detach().float() if value.is_floating_point() else value.detach()
        content = exact.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def cached_hash(model: nn.Module, heads: Collection[str], path: str) -> str:
    """Return :func:`hash_weights`, from the cache folder if it is known for these files.

    Files are taken to be the same if their folder, names, sizes and times of modification (in
    nanoseconds) are. A model without files, as an architecture with random weights, is hashed
    every time.

    Args:
        model, heads: as in :func:`hash_weights`.
        path: folder or hub id from which the model was loaded.
    """
    files = _files(path)
    if not files:
        return hash_weights(model, heads)
    layout = [
        (name, list(value.shape), "" if value.is_floating_point() else str(value.dtype))
        for name, value in _weights(model, heads)
    ]
    key = json.dumps([version("torch"), version("transformers"), files, layout])
    return remembered("weights", key, lambda: hash_weights(model, heads), str, _checked_hash)


def _checked_hash(text: str) -> str:
    if not _HASH.fullmatch(text):
        raise ValueError(f"{text!r} is no hash")
    return text


def _weights(model: nn.Module, heads: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, value in model.named_parameters():
        if not set(name.split(".")) & set(heads):
            yield name, value


def _files(path: str) -> list[tuple[str, int, int]]:
    """Path, size and time of modification of a model's files; none if it has none here."""
    folder = Path(path)
    if path.startswith("config:"):
        return []
    if not folder.is_dir():
        on_hub = try_to_load_from_cache(path, "config.json")
        if not isinstance(on_hub, str):
            return []
        folder = Path(on_hub).parent
    files = [file.resolve() for file in sorted(folder.iterdir()) if file.is_file()]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
