"""The quality of one run by round, as a figure. Ours."""

import sys
from collections.abc import Sequence
from typing import Any

from droppeft.extras import require
from droppeft.report.drawing import looks, new_figure, style, whole_numbers
from droppeft.runs.ledger import RoundRow
from droppeft.tasks.metrics import Metric


def history_figure(rows: Sequence[RoundRow], metric: Metric) -> Any:
    """Return a matplotlib figure with the global model's quality and the training loss by round.

    Args:
        rows: of all rounds.
        metric: the task's primary metric.

    Raises:
        DroppeftError: matplotlib is missing.
    """
    require("report", "the figure")
    key = metric.key("global")
    quality = [(row.round, value) for row in rows if (value := row.quality[key]) is not None]
    losses = [(row.round, row.train_loss) for row in rows if row.train_loss is not None]
    with style():
        figure, axis = new_figure(3.0)
        if quality:
            axis.plot(*zip(*quality, strict=True), **looks(0), label=metric.label)
        axis.set(xlabel="round", ylabel=f"{metric.label} of the global model")
        axis.xaxis.set_major_locator(whole_numbers())
        axis.grid(visible=True)
        other = axis.twinx()
        if losses:
            other.plot(*zip(*losses, strict=True), **looks(1), label="training loss")
        other.set(ylabel="training loss")
        other.spines["right"].set_visible(True)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    _make_visible_in_notebooks()
    return figure


def _make_visible_in_notebooks() -> None:
    """Let a notebook show figures that are the value of a cell, as its ``%matplotlib inline``."""
    if "IPython" in sys.modules:
        from IPython import get_ipython
        from IPython.core.pylabtools import select_figure_formats

        if (shell := get_ipython()) is not None:
            select_figure_formats(shell, {"png"})
