"""Figures of one variant by layer and round: drop rates, arms, coverage, gradients. Ours."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from statistics import fmean
from textwrap import fill
from typing import Any

from droppeft.report.drawing import COLOURS, new_figure, whole_numbers

Row = Mapping[str, Any]

WIDTH = 56
"""Characters in a line of a title."""

ROUNDING = 1e-9
"""A share of steps that is below 1 by less counts as 1."""

RATES, SHARES, TRAINED = "rates", "arms", "trained"
COVERAGE, IMPORTANCE = "coverage", "importance"
"""Beginnings of figures' names, which end with the variant's number. Rates and arms are drawn for
runs with a configurator, trained steps where the backward pass of some
steps ends early, coverage and importance where clients do not send every layer."""


def of_layers(number: int, variant: str, runs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Matplotlib figures of one variant, by name; figures that would be empty are left out.

    Args:
        number: of the variant.
        variant: its name.
        runs: the rounds of each of its runs.
    """
    made = {}
    noted = [[row for row in rows if row.get("notes")] for rows in runs]
    if noted and all(noted):
        title = f"{variant}: drop rate of each layer"
        if any(any(_rates(row)) for row in chain(*noted)):
            made[f"{RATES}-{number}"] = _by_layer(title, noted, _rates)
        made[f"{SHARES}-{number}"] = _shares(variant, noted)
    trained = [
        [row for row in rows if row.get("layer_steps") and row["mean_active_layers"]]
        for rows in runs
    ]
    if trained and all(trained) and any(map(_truncated, chain(*trained))):
        title = f"{variant}: share of steps that trained each layer"
        made[f"{TRAINED}-{number}"] = _by_layer(title, trained, _trained)
    merged = [[row for row in rows if row.get("coverage") and row["accepted"]] for rows in runs]
    if merged and all(merged) and any(min(_covered(row)) < 1 for row in chain(*merged)):
        title = f"{variant}: clients that sent each layer"
        made[f"{COVERAGE}-{number}"] = _by_layer(title, merged, _covered)
        normed = [[row for row in rows if any(row.get("importance") or ())] for rows in runs]
        if all(normed):
            title = f"{variant}: gradient norm of each layer, relative to the round's largest"
            made[f"{IMPORTANCE}-{number}"] = _by_layer(title, normed, _important)
    return made


def _rates(row: Row) -> Sequence[float]:
    """Drop rate of each layer, mean over a round's clients."""
    rates: Sequence[float] = row["notes"]["rates"]
    return rates


def _trained(row: Row) -> Sequence[float]:
    """Share of a round's merged steps that trained each layer."""
    steps = sum(row["layer_steps"]) / row["mean_active_layers"]
    return [count / steps for count in row["layer_steps"]]


def _truncated(row: Row) -> bool:
    """Whether some layers were trained in a part of the steps and ran forward only in others."""
    partly = any(0 < share < 1 - ROUNDING for share in _trained(row))
    return partly and bool(row.get("mean_forward_layers"))


def _covered(row: Row) -> Sequence[float]:
    """Share of a round's merged clients that sent each layer."""
    return [count / row["accepted"] for count in row["coverage"]]


def _important(row: Row) -> Sequence[float]:
    """Gradient norm of each layer, divided by the round's largest."""
    largest = max(row["importance"])
    return [norm / largest for norm in row["importance"]]


def _by_layer(title: str, runs: Sequence[Sequence[Row]], of: Callable[[Row], Any]) -> Any:
    """A heat map of layers by rounds, mean over seeds."""
    import matplotlib as mpl

    by_round: dict[int, list[Sequence[float]]] = {}
    for row in chain.from_iterable(runs):
        by_round.setdefault(row["round"], []).append(of(row))
    rounds, layers = max(by_round), len(of(runs[0][0]))
    unknown = [[float("nan")] * layers]  # for a round without values
    values = [
        [fmean(layer) for layer in zip(*by_round.get(round, unknown), strict=True)]
        for round in range(1, rounds + 1)
    ]
    figure, axis = new_figure(3.0)
    edges = [[place - 0.5 for place in range(count + 1)] for count in (rounds, layers)]
    image = axis.pcolormesh(
        [edge + 1 for edge in edges[0]],
        edges[1],
        list(zip(*values, strict=True)),
        cmap=mpl.colormaps["cividis"].resampled(20),  # 20 colours: 256 would make the page larger
        vmin=0,
        vmax=1,
    )
    axis.set(xlabel="round", ylabel="layer, 0 nearest the input")
    _name(axis, title)
    axis.yaxis.set_major_locator(whole_numbers())
    axis.xaxis.set_major_locator(whole_numbers())
    scale = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    scale.solids.set_edgecolor("face")  # no white lines between the colours
    scale.solids.set_rasterized(False)  # vector graphics in the page, no bitmap
    return figure


def _name(axis: Any, title: str) -> None:
    axis.set_title(fill(title, WIDTH), loc="left", fontsize=9.5)


def _shares(variant: str, runs: Sequence[Sequence[Row]]) -> Any:
    """A stacked plot of the share of clients with each arm, mean over seeds and up to three rounds.

    The rounds are the shown one and the two before it; later rounds have no influence on it.
    """
    every = list(chain.from_iterable(runs))
    rounds = max(row["round"] for row in every)
    arms: dict[str, list[float]] = {}
    for place in range(rounds):
        notes = [row["notes"] for row in every if 0 <= place + 1 - row["round"] <= 2]
        given = [note["labels"][str(arm)] for note in notes for arm in note["chosen"].values()]
        for label in given:
            arms.setdefault(label, [0.0] * rounds)[place] += 1 / len(given)
    figure, axis = new_figure(3.0 + 0.16 * len(arms))
    stack = axis.stackplot(
        range(1, rounds + 1),
        list(arms.values()),
        labels=list(arms),
        colors=[COLOURS[number % len(COLOURS)] for number in range(len(arms))],
        alpha=0.85,
    )
    for number, layer in enumerate(stack):
        layer.set_hatch(("", "//", "..", "xx", "--", "oo", "\\\\", "++")[number % 8])
        layer.set_edgecolor("#ffffff")
        layer.set_linewidth(0.3)
    axis.set(xlabel="round", ylabel="share of clients", ylim=(0, 1), xlim=(1, max(2, rounds)))
    title = f"{variant}: arms, mean of a round and the two before it"
    _name(axis, title)
    axis.xaxis.set_major_locator(whole_numbers())
    figure.legend(loc="outside lower left", ncols=1, frameon=False, fontsize=8.5, reverse=True)
    return figure
