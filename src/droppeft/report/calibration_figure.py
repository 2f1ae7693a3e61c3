"""A figure of what each layer of a model is worth: added loss, gradient share, drop rate. Ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from droppeft.layer_dropout.calibration import EXPENSIVE, expensive_layers, typical_loss
from droppeft.report.drawing import COLOURS, INK, style, whole_numbers

CAPTION = (
    "Top: the loss that is added when a layer alone is skipped, with one standard error. Layers "
    f"above the dotted line add more than {EXPENSIVE} times the typical loss. Middle: the layer's "
    "share of the absolute gradients of all adapters at the start of training. Bottom: the drop "
    "rates that follow. Measured on training rows that no client has."
)

LOG_FROM = 10
"""The added losses have a logarithmic axis if the largest is more than so many times the limit."""

TICKS = tuple(factor * 10.0**power for power in range(-3, 5) for factor in (1, 2, 5))

NORMAL, MARKED = COLOURS[0], COLOURS[1]


def calibration_figure(
    added_loss: Sequence[float],
    error: Sequence[float],
    gradient_share: Sequence[float],
    rates: Sequence[float] | None,
) -> Any:
    """Draw what each of L layers is worth, by layer; expensive layers have a colour of their own.

    Args:
        added_loss, error: (L,) in nats.
        gradient_share: (L,) shares of 1.
        rates: (L,) drop rates; ``None`` leaves them out.
    """
    from matplotlib.figure import Figure

    layers = range(len(added_loss))
    expensive = expensive_layers(added_loss, error)
    colours = [MARKED if layer in expensive else NORMAL for layer in layers]
    panels = [("gradient share", gradient_share)]
    if rates is not None:
        panels.append(("drop rate", rates))
    with style():
        figure = Figure(figsize=(4.8, 2.2 + 1.2 * len(panels)), layout="constrained")
        top, *others = figure.subplots(
            1 + len(panels), 1, sharex=True, height_ratios=[1.8, *[1] * len(panels)]
        )
        bars: dict[str, Any] = {"color": colours, "width": 0.75}
        top.bar(layers, added_loss, yerr=error, ecolor=INK, error_kw={"linewidth": 0.8}, **bars)
        _scale(top, added_loss, typical_loss(added_loss, error))
        top.set(ylabel="added loss, nats")
        for axis, (label, values) in zip(others, panels, strict=True):
            axis.bar(layers, values, **bars)
            axis.set(ylabel=label, ylim=(0, None))
        others[-1].set(xlabel="layer, 0 nearest the input", xlim=(-0.6, len(added_loss) - 0.4))
        others[-1].xaxis.set_major_locator(whole_numbers())
        for axis in (top, *others):
            axis.grid(visible=True, axis="y")
            axis.set_axisbelow(True)
        figure.align_ylabels()
    return figure


def figure_of_result(found: Mapping[str, Any]) -> Any:
    """Draw the value ``calibration`` of a run's ``result.json``, or of ``droppeft calibrate``."""
    total = sum(found["gradient"]) or 1.0
    shares = [one / total for one in found["gradient"]]
    return calibration_figure(
        found["added_loss"], found["added_loss_error"], shares, found["rates"]
    )


def _scale(axis: Any, added_loss: Sequence[float], typical: float) -> None:
    """Draw the limit of what is expensive, and choose a scale on which small values are seen."""
    limit = EXPENSIVE * typical
    if typical > 0:
        axis.axhline(limit, color=INK, linewidth=0.9, linestyle=(0, (1, 3)))
        if max(added_loss) > LOG_FROM * typical:
            axis.set_yscale("symlog", linthresh=limit)
            ticks = [0.0, *(tick for tick in TICKS if limit / 2 < tick < max(added_loss))]
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_yticks([], minor=True)
            axis.set_ylim(bottom=min(0.0, *added_loss) - limit / 20)
    axis.axhline(0, color=INK, linewidth=0.6)
