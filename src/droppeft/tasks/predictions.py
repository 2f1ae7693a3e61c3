"""What a classifier predicts for rows: counts by class, scores by class, and mistakes. Ours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from droppeft.data.texts import Rows


@dataclass(frozen=True)
class Predictions:
    """The predictions for B rows.

    Attributes:
        predicted: class indices, shape (B,).
        labels: true class indices, shape (B,).
        probability: of the predicted class, shape (B,).
        classes: number of classes.
    """

    predicted: Rows
    labels: Rows
    probability: npt.NDArray[np.float32]
    classes: int

    def confusion(self) -> list[list[int]]:
        """Return the number of rows of each true class (row) and predicted class (column)."""
        pairs = self.labels * self.classes + self.predicted
        counts = np.bincount(pairs, minlength=self.classes**2)
        matrix: list[list[int]] = counts.reshape(self.classes, self.classes).tolist()
        return matrix

    def mistakes(self, most: int) -> Rows:
        """Return the places of wrong predictions, the most probable first, of equal ones in order.

        Args:
            most: most places to return.
        """
        wrong = np.flatnonzero(self.predicted != self.labels)
        order = np.argsort(-self.probability[wrong], kind="stable")
        return wrong[order][:most].astype(np.int64)


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of several batches, one after another."""
    return Predictions(
        np.concatenate([part.predicted for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.probability for part in parts]),
        parts[0].classes,
    )


@dataclass(frozen=True)
class ClassScores:
    """How well one class is told from the others.

    Attributes:
        precision: share of the predictions of the class that are right; ``None`` without any.
        recall: share of the rows of the class that are predicted so; ``None`` without rows.
        f1: harmonic mean of the two; ``None`` without predictions and rows.
        rows: number of rows of the class.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    rows: int


def scores_by_class(confusion: Sequence[Sequence[int]]) -> list[ClassScores]:
    """Return the scores of each class.

    Args:
        confusion: C x C counts, rows of true and columns of predicted classes.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    right, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    return [
        ClassScores(
            precision=_share(right[one], predicted[one]),
            recall=_share(right[one], true[one]),
            f1=_share(2 * right[one], true[one] + predicted[one]),
            rows=int(true[one]),
        )
        for one in range(len(counts))
    ]


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


@dataclass(frozen=True)
class Confused:
    """Rows of one class for which another one is predicted.

    Attributes:
        true, predicted: class indices.
        rows: their number.
        of: number of rows of the true class.
    """

    true: int
    predicted: int
    rows: int
    of: int


def most_confused(confusion: Sequence[Sequence[int]], most: int) -> list[Confused]:
    """Return the pairs of classes that are confused most often, those with most rows first."""
    counts = np.asarray(confusion, dtype=np.int64)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    places = zip(*np.unravel_index(order, counts.shape), strict=True)
    return [
        Confused(int(true), int(predicted), int(counts[true, predicted]), int(totals[true]))
        for true, predicted in places
        if counts[true, predicted]
    ]


def confused_sentence(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str | None:
    """Say which class is taken for which other one most often; ``None`` for two classes."""
    if len(names) < 3:
        return None
    for pair in most_confused(confusion, 1):
        return (
            f"Most often confused: {pair.rows:,} of the {pair.of:,} test texts of class "
            f"{names[pair.true]} are taken for {names[pair.predicted]}."
        )
    return None
