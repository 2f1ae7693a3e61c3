"""What the figures of a page have in common: one ink, colours, and marks that differ without them.

Ours. Members differ by marker, line and name, not by colour alone. One ink colour is used for all
that is neither, so that a page can turn it into its own.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK = "#262626"
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#8C6D31", "#332288", "#777777", "#882255", "#999933"),
)
"""Okabe and Ito's six, which any colour vision tells apart, and five for large comparisons."""

MARKERS, LINES = "osD^vPX*", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
"""As many of each that no two members look alike before there are 440."""


def looks(number: int) -> dict[str, Any]:
    """Colour, marker and line of the member with this number, as matplotlib takes them."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def svg(figure: Any) -> str:
    """As text of its own size, without a header, the same in every run."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Within it, what is drawn and written has our ink, and the same bytes every time."""
    import matplotlib as mpl

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    rules: Any = {
        **dict.fromkeys(inked, INK),
        "svg.fonttype": "none",
        "svg.hashsalt": "droppeft",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9.5,
        "grid.color": INK,
        "grid.alpha": 0.15,
    }
    with mpl.rc_context(rules):
        yield


def new_figure(height: float) -> tuple[Any, Any]:
    """A figure as wide as a phone, so many inches high, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, height), layout="constrained")
    return figure, figure.subplots()


def whole_numbers() -> Any:
    """Places the ticks of rounds and layers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
