"""Draw the figures of the documentation from committed results.

``python -m benchmarks.pages.figures`` writes them to ``docs/figures``. Lines and bars have their
names beside them, and differ by marker or shade too, not by colour alone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.pages.comparisons import read_parts
from benchmarks.pages.convergence import RATES, read_grid_and_long
from benchmarks.pages.gradient_fidelity import read_candidates
from benchmarks.pages.studies import REMOVED, Seeds, gaps, label
from benchmarks.study import read_table, read_values
from droppeft.comparison.summary import VariantRow
from droppeft.report.drawing import INK, looks, style

FIGURES = Path(__file__).resolve().parents[2] / "docs/figures"
WIDTH = 8.0
"""Inches; a page shows a figure about 800 pixels wide."""


def main() -> None:
    """Draw all figures."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        with style():
            draw().savefig(FIGURES / f"{name}.png", dpi=150, facecolor="white")


def new_figure(height: float, columns: int, **options: Any) -> tuple[Any, Sequence[Any]]:
    """A figure of one row of panels, each with a light grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for axis in axes:
        axis.grid(visible=True)
        axis.set_axisbelow(True)
    return figure, axes


def title(axis: Any, text: str) -> None:
    """A panel's title, at its left end."""
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold")


def name_lines(axis: Any, ends: Mapping[str, tuple[float, float, str]], apart: float) -> None:
    """Write names beside the ends of lines, moved up where they would overlap.

    Args:
        ends: across, up and colour by name, in the units of the axes.
        apart: least distance of two names, as a part of the vertical axis.
    """
    low, high = axis.get_ylim()
    step, below = apart * (high - low), None
    for name, (across, up, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
        place = up if below is None else max(up, below + step)
        axis.annotate(
            name,
            (across, up),
            xytext=(across + 0.03 * (axis.get_xlim()[1] - axis.get_xlim()[0]), place),
            color=colour,
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )
        below = place


def speed_ups(study: str) -> Any:
    """How many times sooner than FedLoRA each method is, a panel per data set."""
    parts = read_parts(study).parts
    shown = [row.variant for row in parts[0].rows if row.variant not in REMOVED]
    figure, axes = new_figure(1.1 + 0.27 * len(shown), len(parts), sharey=True)
    for axis, part in zip(axes, parts, strict=True):
        rows = {row.variant: row for row in part.rows}
        for place, variant in enumerate(shown):
            _speed_up(axis, place, rows[variant])
        axis.axvline(1, color=INK, linewidth=0.8)
        axis.set(xlim=(0, 2.7), xticks=(0, 1, 2))
        axis.grid(visible=False, axis="y")
        title(axis, Path(part.data).name)
    axes[0].set_yticks(range(len(shown)), [label(study, variant) for variant in shown])
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    note = (
        "times sooner than FedLoRA to its accuracy less a point (bar: modelled, square: measured)"
    )
    figure.supxlabel(note, fontsize=9.5)
    return figure


def _speed_up(axis: Any, place: int, row: VariantRow) -> None:
    """A bar for the modelled clock and a square for the measured, or how many seeds got there."""
    if row.speed_up_modelled is None or row.speed_up_measured is None:
        axis.text(1.06, place, f"{row.reached} of {row.seeds} seeds", va="center", fontsize=8)
        return
    modelled, measured = looks(0)["color"], {**looks(1), "linestyle": "none"}
    axis.barh(place, row.speed_up_modelled, height=0.62, color=modelled)
    axis.plot([row.speed_up_measured], [place], **measured, markersize=6, markeredgecolor="white")
    end = max(row.speed_up_modelled, row.speed_up_measured + 0.08)
    axis.text(end + 0.06, place, f"{row.speed_up_modelled:.2f}", va="center", fontsize=8.5)


def _key(axis: Any, names: Mapping[str, int], across: float, up: float) -> None:
    """Names in the colours of their numbers, in a corner of a panel; the last one is lowest."""
    for line, (name, number) in enumerate(reversed(list(names.items()))):
        axis.text(
            across,
            up + 0.085 * line,
            name,
            color=looks(number)["color"],
            ha="right",
            va="bottom",
            fontsize=9,
            fontweight="bold",
            transform=axis.transAxes,
        )


SETTINGS = {
    "fedlora": "LoRA in all layers",
    "fedlora, last half": "LoRA in the upper half",
    "droppeft, all shared": "adaptive (LoRA)",
    "fedia3, last half": "IA3 in the upper half",
}
COSTS: dict[str, Callable[[VariantRow], float | None]] = {
    "time to the same quality": lambda row: (
        1 / row.speed_up_modelled if row.speed_up_modelled else None
    ),
    "activation memory": lambda row: float(row.activation_bytes_peak or 0),
    "traffic": lambda row: (row.upload_bytes or 0) + (row.download_bytes or 0),
}


def settings() -> Any:
    """What each recommended setting costs in per cent of FedLoRA, on two data sets."""
    parts = read_parts("contest_confirmation").parts[:2]
    figure, axes = new_figure(2.7, len(COSTS), sharey=True)
    for axis, (cost, value) in zip(axes, COSTS.items(), strict=True):
        for shift, shade, part in zip((-0.19, 0.19), (0, 5), parts, strict=True):
            rows = {row.variant: row for row in part.rows}
            full = value(rows["fedlora"]) or 1
            for place, variant in enumerate(SETTINGS):
                found = value(rows[variant])
                _bar(axis, place + shift, None if found is None else found / full, shade)
        title(axis, cost)
        axis.set_xlim(0, 1.25)
        axis.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(SETTINGS)), list(SETTINGS.values()))
    axes[0].invert_yaxis()
    _key(
        axes[2],
        {Path(part.data).name: shade for part, shade in zip(parts, (0, 5), strict=True)},
        0.98,
        0.06,
    )
    return figure


def _bar(axis: Any, place: float, share: float | None, shade: int) -> None:
    if share is None:
        axis.text(0.02, place, "not on every seed", va="center", fontsize=8)
        return
    axis.barh(place, share, height=0.36, color=looks(shade)["color"])
    axis.text(share + 0.02, place, f"{share * 100:.0f} %", va="center", fontsize=8.5)


def layer_dropout_cost() -> Any:
    """What dropping saves, and what single steps store."""
    figure, (saved, steps) = new_figure(3.3, 2)
    rows = [
        row for row in read_table("layer_dropout_cost", "sliced") if row["accelerator"] == "none"
    ]
    saved.plot((0, 0.75), (1, 0.25), color=INK, linewidth=0.8, linestyle=":")
    saved.text(0.3, 0.83, "dotted: share of layers that run", fontsize=8.5)
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == model]
        shift = 0.012 * (2 * number - 1)
        reach = [
            [abs(row["wall_to_full"] - row[f"wall_to_full_{end}"]) for row in own]
            for end in ("low", "high")
        ]
        across, up = [row["rate"] + shift for row in own], [row["wall_to_full"] for row in own]
        look = {**looks(number), "linestyle": "none"}
        saved.errorbar(across, up, reach, **look, markersize=5, capsize=3)
        saved.text(0.02, 0.36 - 0.09 * number, f"{model}: time", color=look["color"], fontsize=8.5)
        stored = [row["bytes_to_full"] for row in own]
        saved.plot(across, stored, "_", color=INK, markersize=12)
    saved.text(0.02, 0.18, "–  stored activations", fontsize=8.5)
    saved.set(xlabel="mean drop rate", ylim=(0, 1.15), xticks=(0, 0.25, 0.5, 0.75))
    title(saved, "a step / a step at full depth")
    _stored_in_steps(steps)
    return figure


def _stored_in_steps(axis: Any) -> None:
    [peaks] = [
        one for one in read_values("layer_dropout_cost")["measured"] if one["part"] == "peaks"
    ]
    rows = read_table("layer_dropout_cost", "peaks")
    for number, (sampling, name) in enumerate(
        {"exact": "exact counts", "bernoulli": "independent gates"}.items()
    ):
        shares = [
            one["stored_bytes"] / peaks["bytes_full"] for one in rows if one["sampling"] == sampling
        ]
        colour = looks(number)["color"]
        axis.plot(shares, color=colour, linewidth=2.2 if sampling == "exact" else 1.1)
        axis.text(49, (0.12, 0.86)[number], name, color=colour, ha="right", fontsize=9)
    axis.set(xlabel="step", ylim=(0, 1))
    title(axis, "stored activations / full depth, half dropped")


VISITS = {"first visit": "first use of a text", "no cache": "no cache", "later visit": "later use"}


def frozen_layers() -> Any:
    """Step time against the share of frozen layers, a panel per model."""
    models, result = read_values("frozen_layers")["models"], read_table("frozen_layers")
    figure, axes = new_figure(3.3, len(models), sharey=True)
    for axis, (name, model) in zip(axes, models.items(), strict=True):
        axis.plot((0, 1), (1, 0), color=INK, linestyle=":", linewidth=0.8)
        axis.text(0.03, 0.04, "dotted: share of layers that run", fontsize=8.5)
        ends = {}
        for number, (visit, title_of_visit) in enumerate(VISITS.items()):
            rows = [
                row
                for row in result
                if row["model"] == name and not row["dropped"]
                if row["visit"] == visit or not row["frozen"]
            ]
            across = [row["frozen"] / model["layers"] for row in rows]
            up = [row["time_ratio"] for row in rows]
            look = looks(number)
            axis.plot(across, up, **look, markersize=5)
            ends[title_of_visit] = (across[-1], up[-1], look["color"])
        axis.set(xlim=(0, 1.2), ylim=(0, 1.08), xlabel="share of layers that are frozen")
        axis.set_xticks((0, 0.25, 0.5, 0.75, 1))
        name_lines(axis, ends, apart=0.075)
        title(axis, f"{name}, {model['batch_size']} x {model['length']} tokens")
    axes[0].set_ylabel("step time, LoRA in all layers = 1")
    return figure


def cost_model() -> Any:
    """Modelled against measured, with the line on which they are equal and 10 % on either side."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = read_table("cost_model")
    figure, axes = new_figure(3.8, 2)
    panels = (
        ("memory of a step, GB", "measured_bytes", "modelled_bytes", 1e9),
        ("time of a step, s", "step_s", "step_modelled_s", 1.0),
    )
    for axis, (name, across, up, unit) in zip(axes, panels, strict=True):
        known = [row for row in rows if row[up] and row[across]]
        for number, model in enumerate(("builtin", "deep12", "bert-large")):
            own = [row for row in known if row["cell"].startswith(model)]
            look = {**looks(number), "linestyle": "none"}
            axis.plot(
                [row[across] / unit for row in own],
                [row[up] / unit for row in own],
                **look,
                markersize=5,
                markerfacecolor="none",
            )
            place = (0.05, 0.93 - 0.07 * number)
            axis.text(*place, model, color=look["color"], transform=axis.transAxes)
        ends = [pick(row[across] / unit for row in known) for pick in (min, max)]
        for factor, line in ((1.0, "-"), (0.9, ":"), (1.1, ":")):
            axis.plot(
                ends, [end * factor for end in ends], color=INK, linewidth=0.7, linestyle=line
            )
        axis.set(xlabel="measured", ylabel="modelled", xscale="log", yscale="log")
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter("{x:g}")
            one.set_minor_formatter(NullFormatter())
        title(axis, name)
    axes[0].text(0.97, 0.05, "dotted: 10 %", ha="right", transform=axes[0].transAxes, fontsize=8.5)
    return figure


def convergence() -> Any:
    """Loss in the long runs, and the gap of every setting of the grid by seed."""
    grid, long = read_grid_and_long()
    figure, (curves, dots) = new_figure(3.8, 2)
    [own] = [found for setting, found in long.items() if setting.schedule == "constant"]
    ends = {
        f"{rate} dropped": _loss_curve(curves, own[rate], number)
        for number, rate in enumerate(RATES)
    }
    curves.set(xlim=(0, 720), ylim=(1.4, 3.1))
    curves.set(xlabel="steps of a client in every round", ylabel="loss of the global model")
    name_lines(curves, ends, apart=0.05)
    title(curves, "48 rounds, constant rate, Dirichlet 10")
    for number, rate in enumerate(RATES[1:], start=1):
        look = {**looks(number), "linestyle": "none"}
        for place, found in enumerate(grid.values()):
            values = gaps(found[rate], found["none"]).values()
            dots.plot(
                list(values), [place + 0.16 * (2 * number - 3)] * len(values), **look, markersize=5
            )
    dots.axvline(0, color=INK, linewidth=0.8)
    dots.set_yticks(range(len(grid)), [str(setting) for setting in grid], fontsize=8.5)
    dots.set_ylim(len(grid) - 0.4, -0.6)
    dots.set_xlabel("gap in loss to nothing dropped, each seed")
    dots.text(0.66, 6.65, "a third", color=looks(1)["color"], fontsize=9)
    dots.text(0.93, 6.65, "half", color=looks(2)["color"], fontsize=9)
    title(dots, "160 steps in every setting")
    return figure


def _loss_curve(axis: Any, own: Seeds, number: int) -> tuple[float, float, str]:
    """Mean and range over seeds; returns the end of the line and its colour."""
    found: dict[int, list[float]] = {}
    for run in own.values():
        for row in run.rows:
            if row["global_loss"] is not None:
                found.setdefault(10 * row["round"], []).append(row["global_loss"])
    look, steps = looks(number), sorted(found)
    means = [fmean(found[one]) for one in steps]
    axis.plot(steps, means, **look, markersize=4)
    low, high = ([pick(found[one]) for one in steps] for pick in (min, max))
    axis.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
    return steps[-1], means[-1], look["color"]


FAMILIES = {
    "truncated": ("full depth", "truncated at 0, 1/2", "truncated at 0, 1/3, 2/3, 2/3"),
    "upper layers": ("full depth", "upper half", "upper third"),
    "… cached": ("upper half, cached", "upper third, cached"),
    "detached": ("half detached",),
    **{
        f"skipped, {shape}": tuple(f"{part} skipped, {shape}" for part in parts)
        for shape, parts in {
            "uniform": ("a sixth", "a third", "half"),
            "incremental": ("a sixth", "a third", "half"),
            "calibrated": ("a sixth", "a third"),
        }.items()
    },
    "as their means": ("a third as its mean", "half as its mean"),
}
"""Candidates of the study of gradients that are connected by a line."""


def gradient_fidelity() -> Any:
    """Squared cosine with full depth on the same batch against the cost, after training."""
    models = read_values("gradient_fidelity")["models"]
    figure, axes = new_figure(4.0, len(models), sharey=True)
    for axis, (name, model) in zip(axes, models.items(), strict=True):
        found = {candidate: rows[-1] for candidate, rows in read_candidates(name).items()}
        axis.plot((0, 1), (0, 1), color=INK, linestyle=":", linewidth=0.8)
        for number, members in enumerate(FAMILIES.values()):
            rows = [found[member] for member in members]
            across = [row["cost"] for row in rows]
            up = [row["batch"] * row["cost"] for row in rows]
            axis.plot(across, up, **looks(number), markersize=5)
        axis.set(xlim=(0, 1.05), ylim=(-0.02, 1.08), xlabel="FLOPs of a step, full depth = 1")
        title(axis, f"{name}, {model['layers']} layers, after {model['steps']} steps")
    axes[0].set_ylabel("squared cosine, same batch")
    axes[0].text(0.08, -0.01, "dotted: as much per FLOP as full depth", fontsize=8.5)
    _key(axes[0], {family: number for number, family in enumerate(FAMILIES)}, 0.29, 0.33)
    return figure


DRAWINGS: dict[str, Callable[[], Any]] = {
    "contest": lambda: speed_ups("contest"),
    "contest_deep": lambda: speed_ups("contest_deep"),
    "convergence": convergence,
    "cost_model": cost_model,
    "frozen_layers": frozen_layers,
    "gradient_fidelity": gradient_fidelity,
    "layer_dropout_cost": layer_dropout_cost,
    "settings": settings,
}
"""Figures by the name of their file."""


if __name__ == "__main__":
    main()
