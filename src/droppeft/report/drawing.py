"""The common style of a page's figures: colours, markers, line styles and one ink colour.

Ours. Variants differ by marker, line style and name, not by colour alone. Text, axes and grid have
one ink colour, which a page replaces by its text colour.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

INK = "#262626"
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#8C6D31", "#332288", "#777777", "#882255", "#999933"),
)
"""Six of Okabe and Ito's palette, which is safe for colour blindness, and five more."""

MARKERS, LINES = "osD^vPX*", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
"""Their numbers and that of the colours are coprime, so that 440 variants all look different."""


def looks(number: int) -> dict[str, Any]:
    """Colour, marker and line style of the variant with this number, as matplotlib takes them."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def svg(figure: Any) -> str:
    """A figure as SVG text, transparent, without a date; the same figure gives the same text."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue()


def inline(image: str) -> Markup:
    """An SVG element without XML header and fixed size, whose ink is the page's text colour.

    Args:
        image: as :func:`svg` returns it.
    """
    start = image.index("<svg")
    end = image.index(">", start)
    opening = " ".join(
        word for word in image[start:end].split() if not word.startswith(("width=", "height="))
    )
    return Markup((opening + image[end:]).replace(INK, "currentColor"))


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings for drawing and saving: the ink colour, and reproducible files."""
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
    """A figure that fits the width of a phone, ``height`` inches high, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, height), layout="constrained")
    return figure, figure.subplots()


def whole_numbers() -> Any:
    """A locator with ticks at whole numbers, for rounds and layers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
