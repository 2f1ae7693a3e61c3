"""The confusion matrix and the scores of each class, for the page of a run. Ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droppeft.quantities import percent
from droppeft.report.page_table import PageTable
from droppeft.tasks.predictions import most_confused, scores_by_class

OPEN, LARGEST = 20, 100
"""A matrix of more classes is folded away, or left out."""

PAIRS = 10
"""Most pairs of classes that are named because they are confused."""

DARKEST = 0.7
"""Opacity of the shade of a cell with all rows of its class; the text stays readable."""


@dataclass(frozen=True)
class Cell:
    """A cell of the matrix.

    Attributes:
        count: number of texts; empty for 0.
        shade: opacity of its background, by the share of the true class's texts.
        right: whether the prediction is right.
        title: what the count says, in words.
    """

    count: str
    shade: float
    right: bool
    title: str


@dataclass(frozen=True)
class Confusion:
    """What a page shows about the predictions of a classifier.

    Attributes:
        names: of the classes.
        matrix: a row of cells for each true class; ``None`` for too many classes.
        is_open: whether the matrix is shown before the reader opens it.
        pairs: classes that are confused most often; empty for two classes.
        scores: precision, recall and F1 of each class, the weakest first.
        folded: the scores of further classes, which are folded away.
    """

    names: Sequence[str]
    matrix: Sequence[Sequence[Cell]] | None
    is_open: bool
    pairs: PageTable
    scores: PageTable
    folded: PageTable


def confusion_table(result: Mapping[str, Any]) -> Confusion | None:
    """Return what a page shows about a result's ``confusion``; ``None`` if it has none."""
    if "confusion" not in result:
        return None
    names, counts = result["class_names"], result["confusion"]
    scores = _scores(counts, names)
    head = ("class", "precision", "recall", "F1", "test texts")
    return Confusion(
        names,
        _matrix(counts, names) if len(names) <= LARGEST else None,
        len(names) <= OPEN,
        _pairs(counts, names),
        PageTable(head, scores[:OPEN]),
        PageTable(head, scores[OPEN:]),
    )


def _matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> list[list[Cell]]:
    return [
        [
            Cell(
                f"{count:,}" if count else "",
                round(DARKEST * count / max(1, sum(row)), 3),
                true == predicted,
                f"{count:,} of {sum(row):,} texts of {names[true]}: {names[predicted]}",
            )
            for predicted, count in enumerate(row)
        ]
        for true, row in enumerate(counts)
    ]


def _pairs(counts: Sequence[Sequence[int]], names: Sequence[str]) -> PageTable:
    found = most_confused(counts, PAIRS) if len(names) > 2 else []
    rows = [(names[one.true], names[one.predicted], f"{one.rows:,} of {one.of:,}") for one in found]
    return PageTable(("true class", "predicted class", "test texts"), rows)


def _scores(counts: Sequence[Sequence[int]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The cells of each class, those with the lowest F1 first and those without texts last."""
    by_class = sorted(
        zip(names, scores_by_class(counts), strict=True),
        key=lambda pair: (pair[1].rows == 0, pair[1].f1 or 0.0),
    )
    return [
        (name, *map(percent, (one.precision, one.recall, one.f1)), f"{one.rows:,}")
        for name, one in by_class
    ]
