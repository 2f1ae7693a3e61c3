"""Figures of a comparison: quality against cost, times to the target, memory. Ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from textwrap import fill
from typing import Any

from droppeft.comparison.answer import SAME, clock_of
from droppeft.comparison.study_files import RunRecord
from droppeft.comparison.summary import Part, Spread, VariantRow
from droppeft.report.drawing import COLOURS, INK, MARKERS, looks, new_figure, style, whole_numbers
from droppeft.report.layers import Row, of_layers
from droppeft.tasks.metrics import ACCURACY, Metric


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a figure that shows quality against cost.

    Attributes:
        label: of the axis, with its unit.
        fields: of a round's row whose sum is the cost; without fields rounds are counted.
        unit: what the cost is divided by.
    """

    label: str
    fields: tuple[str, ...]
    unit: float = 1.0


OVER_ROUNDS = "quality-rounds"

AXES = {
    "quality-modelled-time": Axis("modelled time, s", ("round_modelled_s",)),
    "quality-measured-time": Axis("measured time, clients side by side, s", ("round_measured_s",)),
    "quality-traffic": Axis("traffic, all clients, MB", ("upload_bytes", "download_bytes"), 1e6),
    "quality-energy": Axis("modelled energy, all clients, kJ", ("energy_modelled_j",), 1e3),
    OVER_ROUNDS: Axis("round", ()),
}
BARS: dict[str, tuple[str, Callable[[VariantRow], float | None]]] = {
    "time-modelled": (
        "modelled time to target, s",
        lambda row: _mean_of(row.time_to_target_modelled_s),
    ),
    "time-measured": (
        "measured time to target, s",
        lambda row: _mean_of(row.time_to_target_measured_s),
    ),
    "personalised": (
        "{metric} of clients' own models, mean",
        lambda row: _mean_of(row.personalised),
    ),
    "worst-tenth": (
        "{metric} of clients' own models, worst tenth",
        lambda row: _mean_of(row.worst_tenth),
    ),
    "activations": ("stored activations, peak, MB", lambda row: _in_mb(row.activation_bytes_peak)),
    "upload": ("up, all clients, MB", lambda row: _in_mb(row.upload_bytes)),
    "download": ("down, all clients, MB", lambda row: _in_mb(row.download_bytes)),
}
"""Bar charts by name: title with the place of the metric, and the value of a variant's row."""

OF_THE_TARGET = ("time-modelled", "time-measured")
"""Bar charts that are drawn only if there is a target."""

OF_CLIENTS = ("personalised", "worst-tenth")
"""Bar charts that are drawn only if clients' own models were evaluated."""

TWO, EACH = "global-and-personalised", "each-client"
"""Further figures about clients' own models."""

NAMED = 8
"""Most curves of a figure with a name and a colour: the baseline and those that end best."""

LED = 4
"""Most curves whose ends are connected to their names by lines; more lines would cross curves."""

LEADER: dict[str, Any] = {"color": INK, "linewidth": 0.7, "linestyle": (0, (1, 3)), "alpha": 0.6}
"""How these lines look: dotted and without a curve's colour, since they are no data."""

NAME_WIDTH = 22
"""Characters in a line of a name beside a curve."""

BANDS = 3
"""Most curves of a figure with bands from the lowest to the highest seed; more would overlap."""

Curves = Mapping[int, Sequence[Sequence[tuple[float, float]]]]
"""(cost, quality) of each run of a variant, by the variant's number."""


def figures(part: Part, records: Sequence[RunRecord]) -> dict[str, Any]:
    """Matplotlib figures by name, small enough for a phone; those without values are left out.

    Args:
        part: the variants that they show.
        records: runs of this part.
    """
    with style():
        made = {
            name: _quality(part, found, axis)
            for name, axis in AXES.items()
            if (found := _curves(part, records, axis))
        }
        for name, (title, value) in BARS.items():
            if any(value(row) is not None for row in part.rows):
                made[name] = _bars(part, title.format(metric=part.metric.label), value)
        by_variant = [
            [run for run in records if run.variant == row.variant and run.clients]
            for row in part.rows
        ]
        if any(by_variant):
            made[EACH] = _each_client(part, by_variant)
        both = [row for row in part.rows if row.quality and row.personalised]
        if len(both) > 1:
            made[TWO] = _global_and_personalised(part)
        for number, row in enumerate(part.rows):
            runs = [run.rows for run in records if run.variant == row.variant and run.result]
            made |= of_layers(number, row.variant, runs)
    return made


def main_figure(part: Part, records: Sequence[RunRecord]) -> str:
    """The name of the figure that says most: quality over time.

    Over rounds if all variants take about the same time.
    """
    name = f"quality-{clock_of(part).name}-time"
    ends = [mean_curve(runs)[-1][0] for runs in _curves(part, records, AXES[name]).values()]
    return name if ends and min(ends) < (1 - SAME) * max(ends) else OVER_ROUNDS


def _curves(part: Part, records: Sequence[RunRecord], of: Axis) -> Curves:
    """The curve of every run whose cost is known, by number of the variant."""
    found = {}
    for number, row in enumerate(part.rows):
        runs = [run for run in records if run.variant == row.variant and run.result]
        if points := [
            curve for run in runs if (curve := curve_points(run.rows, of, part.target_metric))
        ]:
            found[number] = points
    return found


def _quality(part: Part, curves: Curves, of: Axis) -> Any:
    figure, axis = new_figure(3.4)
    named = _named(part, curves)
    ends = []
    for number, runs in curves.items():
        if number in named:
            end = _curve(axis, number, runs, band=len(curves) <= BANDS)
            ends.append((*end, number, fill(part.rows[number].variant, NAME_WIDTH)))
        else:
            _faint(axis, runs)
    if part.target is not None:
        _mark_target(axis, part)
    axis.set(xlabel=of.label, ylabel=part.target_metric.label, xlim=(0, None))
    if not of.fields:
        axis.xaxis.set_major_locator(whole_numbers())
    axis.grid(visible=True)
    axis.set_axisbelow(True)
    _name_ends(axis, ends)
    return figure


def _named(part: Part, curves: Curves) -> list[int]:
    """Numbers of the variants with a name: the baseline and those that end best."""
    ends = {number: mean_curve(runs)[-1][1] for number, runs in curves.items()}
    return sorted(
        ends,
        key=lambda number: (
            part.rows[number].variant == part.baseline,
            part.target_metric.gain(ends[number], 0.0),
        ),
        reverse=True,
    )[:NAMED]


def _mark_target(axis: Any, part: Part) -> None:
    """A dotted line with its value."""
    axis.axhline(part.target, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
    axis.annotate(
        f"target {part.target_metric.text(part.target)}",
        xy=(0, part.target),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8.5,
    )


def curve_points(
    rows: Sequence[Row], of: Axis, metric: Metric = ACCURACY
) -> list[tuple[float, float]]:
    """(cost so far, quality) of every evaluated round; empty if a round's cost is unknown."""
    if any(row[field] is None for row in rows for field in of.fields):
        return []
    key = metric.key("global")
    sums = accumulate(sum(row[field] for field in of.fields) if of.fields else 1 for row in rows)
    return [
        (cost / of.unit, row[key])
        for cost, row in zip(sums, rows, strict=True)
        if row[key] is not None
    ]


def mean_curve(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """(cost, quality) by round: means over seeds, from the :func:`curve_points` of each."""
    by_round = zip(*runs, strict=False)
    return [(fmean(cost for cost, _ in each), fmean(up for _, up in each)) for each in by_round]


def _faint(axis: Any, runs: Sequence[Sequence[tuple[float, float]]]) -> None:
    """A thin grey curve without a name."""
    across, up = zip(*mean_curve(runs), strict=True)
    axis.plot(across, up, color=INK, linewidth=0.7, alpha=0.3, zorder=1)


def _curve(
    axis: Any, number: int, runs: Sequence[Sequence[tuple[float, float]]], *, band: bool
) -> tuple[float, float]:
    """Draw the mean over seeds, above a light band from lowest to highest; return its end."""
    across, up = zip(*mean_curve(runs), strict=True)
    every = max(1, len(across) // 8)
    axis.plot(across, up, **looks(number), markevery=every, markersize=4, linewidth=1.8, zorder=3)
    if band and len(runs) > 1:
        heights = [[up for _, up in each] for each in zip(*runs, strict=False)]
        low, high = [min(each) for each in heights], [max(each) for each in heights]
        colour = looks(number)["color"]
        axis.fill_between(across, low, high, color=colour, alpha=0.12, linewidth=0, zorder=1)
    return across[-1], up[-1]


def _name_ends(axis: Any, ends: Sequence[tuple[float, float, int, str]]) -> None:
    """Write each curve's marker and name beside the plot, near the height of its end."""
    low, high = axis.get_ylim()
    right, line = axis.get_xlim()[1], 0.065 * (high - low)
    top = -float("inf")  # of the names so far
    heights = []
    ends = sorted(ends, key=lambda end: end[1])
    for _, height, _, name in ends:
        half = line * (name.count("\n") + 1.15) / 2
        heights.append(max(height, top + half))
        top = heights[-1] + half
    over = max(0.0, top - high)
    for (across, height, number, name), shown in zip(ends, heights, strict=True):
        place, look = shown - over, looks(number)
        axis.plot([1.03 * right], [place], **look, markersize=4.5, clip_on=False)
        if len(ends) <= LED:
            axis.plot([across, 1.03 * right], [height, place], **LEADER, clip_on=False)
        axis.annotate(
            name,
            xy=(1.03 * right, place),
            xytext=(6, 0),
            textcoords="offset points",
            annotation_clip=False,
            va="center",
        )
    axis.set(ylim=(low, high), xlim=(0, right))


def _global_and_personalised(part: Part) -> Any:
    """Global against personalised quality: mean and standard deviation over seeds."""
    figure, axis = new_figure(3.2 + 0.1 * len(part.rows))
    for number, row in enumerate(part.rows):
        if row.quality and row.personalised:
            axis.errorbar(
                row.quality.mean,
                row.personalised.mean,
                xerr=row.quality.deviation,
                yerr=row.personalised.deviation,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=6,
                linewidth=0.8,
                label=row.variant,
            )
    label = part.metric.label
    axis.set(xlabel=f"{label} of the global model", ylabel=f"personalised {label}")
    axis.grid(visible=True)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _each_client(part: Part, runs: Sequence[Sequence[RunRecord]]) -> Any:
    """A row per variant, with a dot per client and seed and a stroke at their mean."""
    figure, axis = new_figure(0.8 + 0.3 * len(part.rows))
    for place, records in enumerate(runs):
        values = [client[part.metric.name] for run in records for client in run.clients]
        if values:
            colour = COLOURS[place % len(COLOURS)]
            # Fixed vertical offsets keep dots of equal height apart.
            heights = [place + 0.11 * (number % 5 - 2) for number in range(len(values))]
            dots: dict[str, Any] = {"alpha": 0.4, "markersize": 3.2, "linewidth": 0}
            axis.plot(values, heights, "o", color=colour, **dots)
            mean = fmean(values)
            axis.plot([mean] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.4)
    axis.set(yticks=list(range(len(part.rows))))
    figure.supxlabel(f"{part.metric.label} of a client's own model", fontsize=9.5)
    axis.set_yticklabels([row.variant for row in part.rows])
    axis.invert_yaxis()
    axis.grid(visible=True, axis="x")
    axis.tick_params(left=False)
    return figure


def _mean_of(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def _in_mb(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _shown(value: float) -> str:
    """Three significant digits; below 1 three decimals, so that accuracies have equal length."""
    if value < 1:
        return f"{value:.3f}"
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _bars(part: Part, title: str, value: Callable[[VariantRow], float | None]) -> Any:
    """A bar per variant with its value, or the reason why it has none."""
    figure, axis = new_figure(0.6 + 0.36 * len(part.rows))
    values = [value(row) for row in part.rows]
    places = range(len(values))
    colours = [COLOURS[number % len(COLOURS)] for number in places]
    axis.barh(places, [length or 0.0 for length in values], color=colours, height=0.62)
    largest = max((length for length in values if length is not None), default=1.0) or 1.0
    for place, (row, length) in enumerate(zip(part.rows, values, strict=True)):
        missing = "not by all seeds" if row.seeds else "no result"
        text = missing if length is None else _shown(length)
        end = (length or 0.0, place)
        axis.annotate(text, end, (4, 0), textcoords="offset points", va="center")
    axis.set(xlim=(0, 1.35 * largest), yticks=list(places), ylim=(-0.6, len(values) - 0.4))
    axis.set_yticklabels([row.variant for row in part.rows])
    figure.suptitle(
        title, x=0.01, ha="left", fontsize=9.5
    )  # not of the axes: long names may make these narrow
    axis.invert_yaxis()
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(bottom=False, labelbottom=False, left=False)
    return figure
