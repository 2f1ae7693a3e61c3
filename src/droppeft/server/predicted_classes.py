"""What the delivered classifier predicts for the test rows: confusion matrix and mistakes. Ours."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from droppeft.data.texts import Rows, TextTable
from droppeft.files import as_json_lines, write_atomically
from droppeft.runs.folder import MISTAKES
from droppeft.server.prepare import Prepared
from droppeft.tasks.predictions import Predictions, joined
from droppeft.training.loop import Evaluation


def predicted_classes(prepared: Prepared, evaluation: Evaluation, out: Path) -> dict[str, Any]:
    """Count predictions by class, and write the most confident mistakes if they are asked for.

    Args:
        prepared: the server.
        evaluation: of the delivered model on test rows.
        out: folder of the run, where ``mistakes.jsonl`` is written.

    Returns:
        For ``result.json``: ``class_names``, and ``confusion``, the C x C counts of true classes
        (rows) and predicted classes (columns). Nothing without classes, or if the loss is not
        finite.
    """
    if prepared.loaded.task.generates or not math.isfinite(evaluation.loss):
        return {}
    found = joined([result.observed for _, result in evaluation.batches])
    names = prepared.loaded.data.label_names
    if most := prepared.config.evaluation.mistakes:
        rows = np.concatenate([rows for rows, _ in evaluation.batches])
        mistakes = _mistakes(found, rows, prepared.loaded.data.test, names, most)
        write_atomically(out / MISTAKES, as_json_lines(mistakes))
    return {"class_names": list(names), "confusion": found.confusion()}


def _mistakes(
    found: Predictions, rows: Rows, table: TextTable, names: tuple[str, ...], most: int
) -> list[dict[str, Any]]:
    """The most confident mistakes, each with ``text``, the second text ``pair`` if there is one,
    the names of the ``true`` and the ``predicted`` class, and the latter's ``probability``."""
    return [
        {
            "text": table.texts[rows[place]],
            **({"pair": table.pairs[rows[place]]} if table.pairs else {}),
            "true": names[found.labels[place]],
            "predicted": names[found.predicted[place]],
            "probability": float(found.probability[place]),
        }
        for place in found.mistakes(most)
    ]
