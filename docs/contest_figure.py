"""The contest in one picture: ``python docs/contest_figure.py`` draws it from the result files.

A column per data set: above, accuracy of the global model against the modelled clock; below, what
clients have of it themselves against what they sent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies import seeds_of_comparison
from tables import FIGURES, read_compared, was_compared

from droppeft.comparison.study_files import RunRecord
from droppeft.comparison.summary import Part, summary
from droppeft.report.drawing import INK, looks, style
from droppeft.report.figures import AXES, curve_points, mean_curve

CONTESTS = ("contest", "contest_deep")
"""Each a comparison of which there may be a result, and the name of its picture."""

CLOCK = AXES["accuracy-modelled-time"]


def draw(name: str) -> None:
    """The picture of one comparison; its variants look as they do in the first."""
    from matplotlib.figure import Figure

    study, records = read_compared(name)
    parts = summary(study, records)
    variants = dict.fromkeys([*read_compared(CONTESTS[0])[0].variants, *study.variants])
    numbers = {variant: number for number, variant in enumerate(variants)}
    width = 1.2 + 3.1 * len(parts)
    with style():
        figure = Figure(figsize=(width, 6.6 if len(parts) > 1 else 7.6), layout="constrained")
        grid: Any = figure.subplots(2, len(parts), squeeze=False)
        for (above, below), part in zip(grid.T, parts, strict=True):
            runs = [one for one in records if one.place == (part.data, part.model)]
            _curves(above, part, runs, numbers)
            _own_models(below, part, numbers)
        grid[0, 0].set_ylabel("accuracy of the global model")
        grid[1, 0].set_ylabel("accuracy of clients' own models")
        handles, names = grid[1, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=max(2, int(width / 1.9)),
            frameon=False,
            markerscale=0.6,
            columnspacing=1.4,
        )
        note = f"means over {seeds_of_comparison(study, records)}; dotted: the target; large: ours"
        figure.suptitle(note.replace("**", ""), fontsize=9.5, x=0.01, ha="left")
        figure.savefig(FIGURES / f"{name}.png", dpi=150, facecolor="white")


def _curves(
    axis: Any, part: Part, records: Sequence[RunRecord], numbers: Mapping[str, int]
) -> None:
    for row in part.rows:
        runs = [one for one in records if one.variant == row.variant and one.result]
        found = mean_curve([curve_points(one.rows, CLOCK) for one in runs])
        if found:
            across, up = zip(*found, strict=True)
            axis.plot(across, up, **_looks(numbers[row.variant], row.variant), alpha=0.9)
    if part.target is not None:
        axis.axhline(part.target, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
    axis.set(xlabel=CLOCK.label, xlim=(0, None))
    axis.set_title(Path(part.data).name, loc="left", fontweight="bold", fontsize=10.5)
    axis.grid(visible=True)


def _own_models(axis: Any, part: Part, numbers: Mapping[str, int]) -> None:
    for row in part.rows:
        if row.personalised and row.upload_bytes is not None:
            drawn = _looks(numbers[row.variant], row.variant)
            drawn["markersize"] *= 1.8
            sent = row.upload_bytes / 1e6
            axis.plot([sent], [row.personalised.mean], **drawn, label=row.variant)
    axis.margins(0.08, 0.1)
    axis.set(xlabel="sent by all clients, MB", xlim=(0, None))
    axis.grid(visible=True)


def _looks(number: int, variant: str) -> dict[str, Any]:
    ours = variant.startswith("droppeft")
    return {
        **looks(number),
        "linewidth": 2.4 if ours else 1.2,
        "markersize": 6.5 if ours else 4.0,
        "zorder": 3 if ours else 2,
    }


if __name__ == "__main__":
    for contest in filter(was_compared, CONTESTS):
        draw(contest)
