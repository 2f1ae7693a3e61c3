"""Curves of several runs in one figure: quality, or training loss. Ours."""

from collections.abc import Sequence

from markupsafe import Markup

from droppeft.report.drawing import inline, looks, new_figure, style, svg, whole_numbers
from droppeft.ui.run_state import ACROSS, RunState, curve

LONGEST_NAME = 34
"""Characters of a run's name in the legend; of a longer one the middle is left out."""


def draw_curves(
    shown: Sequence[tuple[str, RunState | None]], column: str, label: str, across: str
) -> Markup:
    """Return an SVG figure with a curve for each run, in the order of the colours of ``looks``.

    Args:
        shown: names and states of the runs; one that cannot be read has no curve.
        column, across: as in :func:`~droppeft.ui.run_state.curve`.
        label: what the curves show.
    """
    with style():
        figure, axis = new_figure(3.0)
        for number, (name, run) in enumerate(shown):
            points = curve(run, column, across) if run else []
            if points:
                every = max(1, len(points) // 10)
                what = _short(name)
                axis.plot(*zip(*points, strict=True), **looks(number), label=what, markevery=every)
        axis.set(xlabel=across if across == ACROSS[0] else f"{across} (s)", ylabel=label)
        if across == ACROSS[0]:
            axis.xaxis.set_major_locator(whole_numbers())
        axis.set_xlim(left=0)
        axis.grid(visible=True)
        if axis.lines:
            columns = 1 if any(len(name) > 16 for name, _ in shown) else 3
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)
    return inline(svg(figure))


def _short(name: str) -> str:
    """The name of a run without its folder, and without its middle if it is long."""
    name = name.rpartition("/")[2]
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}…{name[-8:]}"
