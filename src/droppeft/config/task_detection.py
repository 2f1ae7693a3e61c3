"""Finds the task of settings that name none, from the model and the columns of the data. Ours."""

import csv
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

CLASSIFICATION, CAUSAL_LM = "classification", "causal_lm"

LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
"""Names under which a column of labels is found."""

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text",),
    ("sentence",),
    ("content",),
)
"""Names under which a column of texts, or two for pairs of texts, are found."""

CONVERSATION_COLUMNS = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "Alpaca": ("instruction", "output"),
    "Dolly": ("instruction", "response"),
    "text": ("text",),
}
"""Columns by which each shape of conversations and documents is recognised, in this order."""


def detected_task(tree: Mapping[str, Any]) -> str:
    """Return the task of settings without ``task``.

    It is ``causal_lm`` if the model is a ``.gguf`` file or ``smollm2``, if ``source.prompt`` names
    a column, or if the columns of a file are those of conversations, or a single column of texts.
    Every other table is classified. Data of the hub are not looked into.

    Args:
        tree: nested settings, which need not be valid.
    """
    model, data = str(tree.get("model", "")), os.path.expandvars(str(tree.get("data", "builtin")))
    given = tree.get("source")
    source: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    if model == "smollm2" or model.endswith(".gguf") or "prompt" in source:
        return CAUSAL_LM
    present = set() if data == "builtin" else set(columns_of(Path(data).expanduser()))
    shape = next((n for n, one in CONVERSATION_COLUMNS.items() if present.issuperset(one)), None)
    # A text with other columns is more likely to lack the name of its label.
    is_document = shape == "text" and len(present) == 1 and not source
    return CAUSAL_LM if is_document or shape not in (None, "text") else CLASSIFICATION


def columns_of(path: Path) -> Sequence[str]:
    """Return the columns of a file, or of a folder's first file; none if they cannot be read."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
            return columns_of(files[0]) if files else ()
        reader = _READERS.get(path.suffix)
        return () if reader is None else reader(path)
    except (OSError, ValueError, StopIteration, LookupError, TypeError, pyarrow.ArrowException):
        return ()  # reading the data says what is wrong


def _of_parquet(path: Path) -> Sequence[str]:
    names: Sequence[str] = pyarrow.parquet.read_schema(path).names
    return names


def _of_csv(path: Path) -> Sequence[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file))


def _of_json(path: Path) -> Sequence[str]:
    """The keys of the first object, of a list or of a line."""
    with path.open(encoding="utf-8-sig") as file:
        first = next(line for line in itertools.islice(file, 100) if line.strip())
        if not first.lstrip().startswith("["):
            return tuple(json.loads(first))
        file.seek(0)
        return tuple(json.load(file)[0])


_READERS = {".parquet": _of_parquet, ".csv": _of_csv, ".jsonl": _of_json, ".json": _of_json}
