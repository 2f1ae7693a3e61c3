"""Finds the task of a configuration that does not name one, from its model and its data. Ours."""

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from droppeft.data.conversation_shapes import detect_shape
from droppeft.data.sources import LABEL_COLUMNS
from droppeft.data.splits import READERS

CLASSIFICATION, CAUSAL_LM = "classification", "causal_lm"


def detected_task(tree: Mapping[str, Any]) -> str:
    """Return the task of settings without ``task``.

    It is ``causal_lm`` if the model is a ``.gguf`` file or ``smollm2``, if ``source`` names a
    column of prompts, or if a file's columns hold conversations or documents: those of a table
    with a column of labels as well are classified. Data of the hub are not looked into.

    Args:
        tree: nested settings, which need not be valid.
    """
    model, data = str(tree.get("model", "")), str(tree.get("data", "builtin"))
    source = tree.get("source")
    columns = source if isinstance(source, Mapping) else {}
    if model == "smollm2" or model.endswith(".gguf") or "prompt" in columns:
        return CAUSAL_LM
    if "label" in columns or data == "builtin":
        return CLASSIFICATION
    found = columns_of(Path(data).expanduser())
    shape = detect_shape(found)
    if shape is None or (shape == "text" and set(found) & set(LABEL_COLUMNS)):
        return CLASSIFICATION
    return CAUSAL_LM


def columns_of(path: Path) -> Sequence[str]:
    """Return the columns of a file, or of a folder's first file; none if they cannot be read."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in READERS)
            return columns_of(files[0]) if files else ()
        return _columns_of_file(path)
    except (OSError, ValueError, StopIteration, csv.Error, pyarrow.ArrowException):
        return ()  # reading the data says what is wrong


def _columns_of_file(path: Path) -> Sequence[str]:
    if path.suffix == ".parquet":
        names: Sequence[str] = pyarrow.parquet.read_schema(path).names
        return names
    if path.suffix not in READERS:
        return ()
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            return next(csv.reader(file))
        if path.suffix == ".json":
            start = file.read(1)
            file.seek(0)
            if start == "[":
                return _names(next(iter(json.load(file))))
        first = next(line for line in itertools.islice(file, 100) if line.strip())
        return _names(json.loads(first))


def _names(row: object) -> Sequence[str]:
    return tuple(row) if isinstance(row, Mapping) else ()
