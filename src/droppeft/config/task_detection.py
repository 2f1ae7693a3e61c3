"""Finds the task of settings that name none, from the model and the columns of the data. Ours."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from droppeft import table_files
from droppeft.table_files import is_table_file

CLASSIFICATION, CAUSAL_LM = "classification", "causal_lm"

SAVED, SAVED_SPLITS, SAVED_INFO = "state.json", "dataset_dict.json", "dataset_info.json"
"""Files of a folder that ``save_to_disk`` of the datasets library writes."""

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
    present = {name.casefold() for name in present}
    shape = next((n for n, one in CONVERSATION_COLUMNS.items() if present.issuperset(one)), None)
    # A text with other columns is more likely to lack the name of its label.
    is_document = shape == "text" and len(present) == 1 and not source
    return CAUSAL_LM if is_document or shape not in (None, "text") else CLASSIFICATION


def columns_of(path: Path) -> Sequence[str]:
    """Return the columns of a file, or of a folder's training rows; none if they are unreadable.

    Reading the data says what is wrong.
    """
    try:
        if not path.is_dir():
            return table_files.columns_of(path) if path.is_file() else ()
        if is_saved_dataset(path):
            return _saved_columns(path)
        files = sorted(filter(is_table_file, path.iterdir()), key=_train_first)
    except OSError:
        return ()
    return table_files.columns_of(files[0]) if files else ()


def is_saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` of the datasets library wrote this folder."""
    return any((path / name).is_file() for name in (SAVED, SAVED_SPLITS))


def _train_first(file: Path) -> tuple[bool, Path]:
    return not file.name.startswith("train"), file


def _saved_columns(path: Path) -> Sequence[str]:
    try:
        if (path / SAVED_SPLITS).is_file():
            path /= json.loads((path / SAVED_SPLITS).read_text())["splits"][0]
        return tuple(json.loads((path / SAVED_INFO).read_text())["features"])
    except (ValueError, LookupError, TypeError):
        return ()
