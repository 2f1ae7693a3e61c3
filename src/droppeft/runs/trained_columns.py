"""The columns of texts and labels that a run has read. Ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from droppeft.runs.folder import RESULT, read_result, saved_config


@dataclass(frozen=True)
class TrainedColumns:
    """The columns that a run has read.

    Attributes:
        text: of the text, or of both texts of a pair; empty if it is not known.
        label: of the label; ``None`` if it is not known.
    """

    text: tuple[str, ...]
    label: str | None


def trained_columns(run: Path) -> TrainedColumns:
    """Return the columns that a run has read, as far as its folder tells.

    Raises:
        DroppeftError: the folder holds no run.
    """
    config = saved_config(run)
    found: Mapping[str, Any] = {}
    if (run / RESULT).is_file():
        found = read_result(run).get("data_findings", {}).get("columns", {})
    texts = tuple(name for kind, name in found.items() if "text" in kind)
    return TrainedColumns(config.source.text or texts, config.source.label or found.get("label"))
