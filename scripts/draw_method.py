"""Draw the pictures of the method as SVG: a round, layers over steps, layers over steps by device.

    python scripts/draw_method.py

It writes them to ``docs/assets``. What layers do in a step is drawn by ``LayerModes.draw``, with
the random numbers of a run, and what `adaptive` gives to devices is chosen by the code of its
configurator. Each picture has a panel and colours for the reader's light or dark scheme.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from droppeft.bandit.arms import Arm, Depth, candidates, modes_of_arm, steps_of_arm, trained_shares
from droppeft.bandit.choosing import choose_together
from droppeft.bandit.federated import LEAST_VALUE
from droppeft.bandit.layer_values import LayerValues
from droppeft.bandit.policies import ScoredArms
from droppeft.config.defaults import DEFAULTS_OF_METHOD_AND_TASK, METHOD_DEFAULTS
from droppeft.layer_dropout import LayerModes, Mode, layer_rates, protected_ends, starts_of
from droppeft.layer_dropout.modes import Modes
from droppeft.seeds import python_generator

ASSETS = Path(__file__).resolve().parents[1] / "docs/assets"

LAYERS, STEPS = 12, 12
"""Of a model, and of a local training."""

SPEEDS = {"fast device": 4.0, "middle device": 2.0, "slow device": 1.0}
"""Steps per second, relative to the slowest."""

FORWARD_COST, TRAIN_COST = 1.0, 3.0
"""FLOPs of a layer in a step: a backward pass takes twice as many as a forward pass."""

WIDTH = 720
CELL, ROW, GAP = 15.0, 9.0, 40.0
"""Width and height of a step of a layer, and the space between panels."""

STYLE = """
text { font-family: ui-sans-serif, system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  font-size: 15px; fill: #1d2125; }
.soft { fill: #5b6470; font-size: 14px; } .bold { font-weight: 700; }
.ground { fill: #ffffff; stroke: #d8dde3; } .box { fill: #f1f5f7; stroke: #c3ccd4; }
.train { fill: #0d9488; } .forward { fill: #a5d8d2; } .cached { fill: #f2b84b; }
.skip { fill: none; stroke: #94a3b8; stroke-dasharray: 2 2; }
.arrow { fill: none; stroke: #64748b; stroke-width: 2; } .head { fill: #64748b; }
.up { stroke: #d97706; } .up-head { fill: #d97706; }
.paper { fill: #ffffff; stroke: #94a3b8; } .line { stroke: #94a3b8; }
.disc { fill: #1d2125; } .number { fill: #ffffff; font-size: 13px; font-weight: 700; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9ec; } .soft { fill: #a7b0ba; }
  .ground { fill: #14171a; stroke: #333b44; } .box { fill: #1f252b; stroke: #3d4751; }
  .train { fill: #2dd4bf; } .forward { fill: #1d625c; } .cached { fill: #d99a1c; }
  .skip { stroke: #64748b; } .paper { fill: #1f252b; stroke: #7c8894; } .line { stroke: #7c8894; }
  .arrow { stroke: #94a3b8; } .head { fill: #94a3b8; }
  .up { stroke: #fbbf24; } .up-head { fill: #fbbf24; }
  .disc { fill: #e6e9ec; } .number { fill: #14171a; }
}
"""

NAMES = {
    Mode.TRAIN: "trained",
    Mode.FORWARD: "forward only",
    Mode.CACHED: "read from the cache",
    Mode.SKIP: "skipped",
}
"""Names of the modes as docs/concepts/layer_dropout.md has them."""


@dataclass(frozen=True)
class Panel:
    """Layers over steps: a title in two lines, and the modes of every step."""

    title: str
    subtitle: str
    steps: Sequence[Modes]


def main() -> None:
    """Write all pictures."""
    for name, text in pictures().items():
        (ASSETS / name).write_text(text, encoding="utf-8")


def pictures() -> dict[str, str]:
    """All pictures by the name of their file."""
    return {
        "round.svg": a_round(),
        "layer_modes.svg": grid(
            "Layers over the steps of a local training, under six settings",
            layer_modes(),
        ),
        "adaptive.svg": grid(
            "Layers over the steps of a local training that adaptive gives to three devices",
            [*chosen("classification"), *chosen("causal_lm")],
        ),
    }


def layer_modes() -> list[Panel]:
    """One panel for each way in which settings decide what layers do."""
    ends = protected_ends(LAYERS, 1, 1)
    uniform, incremental = (
        layer_rates(1 / 3, shape, LAYERS, protected=ends) for shape in ("uniform", "incremental")
    )
    half = LAYERS // 2
    settings = {
        ("full depth", "every layer, every step"): LayerModes(LAYERS),
        ("layer dropout", "a third, uniform"): LayerModes(LAYERS, rates=uniform),
        ("layer dropout", "a third, incremental"): LayerModes(LAYERS, rates=incremental),
        ("truncated backward", "depths 1, .67, .33, .33"): LayerModes(
            LAYERS, starts=starts_of((1.0, 0.67, 0.33, 0.33), LAYERS)
        ),
        ("upper half", "lower half frozen"): LayerModes(LAYERS, frozen=half),
        ("upper half, cached", "frozen layers are read"): LayerModes(
            LAYERS, frozen=half, cached=True
        ),
    }
    return [Panel(*title, drawn(modes, STEPS)) for title, modes in settings.items()]


def drawn(modes: LayerModes, steps: int, client: int = 0) -> list[Modes]:
    """The modes of every step of a client's local training in round 1 of a run with seed 0."""
    of = {"seed": 0, "round": 1, "client": client}
    return [
        modes.draw(
            python_generator(purpose="starts", step=step, **of),
            python_generator(purpose="gates", step=step, **of),
        )
        for step in range(steps)
    ]


def chosen(task: str) -> list[Panel]:
    """What `adaptive` gives to each device for a task, when all layers are worth the same."""
    general = METHOD_DEFAULTS["adaptive"]
    own = DEFAULTS_OF_METHOD_AND_TASK.get(("adaptive", task), {})
    settings = {**general["configurator"], **own.get("configurator", {})}
    frozen = LAYERS // 2 if own.get("frozen", general["frozen"])["layers"] == "half" else 0
    depth = Depth(LAYERS, frozen, protect_first=0, protect_last=0)
    arms = candidates((0.0,), settings["depths"], settings.get("steps", (1.0,)), depth)
    values = LayerValues.unknown(LAYERS)
    worth = np.array([arm.steps * values.of(trained_shares(arm, depth)) for arm in arms])
    work = np.array([_work(arm, depth) for arm in arms])
    seconds = np.array([work / speed for speed in SPEEDS.values()])
    scored = ScoredArms(np.tile(worth, (len(SPEEDS), 1)), worth)
    numbers = choose_together(scored, seconds, np.ones(seconds.shape, dtype=bool), LEAST_VALUE)
    what = {"classification": "classification", "causal_lm": "language model"}[task]
    return [
        Panel(device, what, drawn(modes_of_arm(arm, depth), steps_of_arm(arm, STEPS), client))
        for client, (device, arm) in enumerate(
            zip(SPEEDS, (arms[number] for number in numbers), strict=True)
        )
    ]


def _work(arm: Arm, depth: Depth) -> float:
    """FLOPs of a local training with an arm."""
    a_step = modes_of_arm(arm, depth).expected([TRAIN_COST] * LAYERS, [FORWARD_COST] * LAYERS)
    return steps_of_arm(arm, STEPS) * a_step


def grid(label: str, panels: Sequence[Panel]) -> str:
    """Panels in three columns, with a legend of the modes that occur."""
    wide, high = STEPS * CELL, LAYERS * ROW
    left = (WIDTH - 3 * wide - 2 * GAP) / 2 + 12
    parts: list[str] = []
    for number, panel in enumerate(panels):
        x = left + (number % 3) * (wide + GAP)
        y = 30 + (number // 3) * (high + 84)
        parts += [
            text(x, y, panel.title, "bold"),
            text(x, y + 18, panel.subtitle, "soft"),
            *_cells(panel.steps, x, y + 28),
        ]
        if number % 3 == 0:
            middle = y + 28 + high / 2
            parts.append(
                f'<text class="soft" text-anchor="middle" '
                f'transform="rotate(-90 {x - 10:g} {middle:g})" x="{x - 10:g}" y="{middle:g}">'
                "layers</text>"
            )
        parts.append(text(x, y + 28 + high + 16, "steps", "soft"))
    modes = [mode for mode in Mode if any(mode in step for panel in panels for step in panel.steps)]
    bottom = 30 + (len(panels) // 3) * (high + 84)
    parts += _legend(modes, left, bottom)
    return picture(label, bottom + 26, parts)


def _cells(steps: Sequence[Modes], x: float, y: float) -> list[str]:
    """A rectangle for each layer and step; the first layer is the lowest."""
    return [
        rectangle(x + step * CELL, y + (LAYERS - 1 - layer) * ROW, CELL - 2, ROW - 2, mode.value)
        for step, modes in enumerate(steps)
        for layer, mode in enumerate(modes)
    ]


def _legend(modes: Sequence[Mode], x: float, y: float) -> list[str]:
    parts = []
    for mode in modes:
        name = NAMES[mode]
        parts += [rectangle(x, y - 9, 20, 10, mode.value), text(x + 28, y, name, "soft")]
        x += 60 + 7.6 * len(name)
    return parts


def rectangle(
    x: float, y: float, width: float, height: float, kind: str, corner: float = 1.5
) -> str:
    """A rectangle; an outline is drawn inside of it."""
    inset = 0.5 if kind == "skip" else 0.0
    x, y, width, height = x + inset, y + inset, width - 2 * inset, height - 2 * inset
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'rx="{corner:g}"/>'
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def picture(label: str, height: float, parts: Sequence[str]) -> str:
    """A whole SVG file on a panel of its own."""
    ground = rectangle(0.5, 0.5, WIDTH - 1, height - 1, "ground", corner=12)
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
            f'aria-label="{escape(label)}">',
            f"<style>{STYLE}</style>",
            ground,
            *parts,
            "</svg>\n",
        )
    )


BLOCKS = 6
"""Layers of the model in the picture of a round."""

SERVER, CLIENT = (260.0, 18.0, 200.0, 142.0), (200.0, 176.0)
"""Place and size of the server's box; size of a client's."""


def a_round() -> str:
    """A server and three clients, of which each trains some of the layers."""
    x, y, width, height = SERVER
    middle = x + width / 2
    below = y + height
    top = below + 76
    parts = [
        rectangle(x, y, width, height, "box", corner=10),
        text(middle, y + 24, "server", "bold", "middle"),
        *_stack([Mode.TRAIN] * (BLOCKS // 2), x + 30, y + 52, 140),
    ]
    kinds = chosen("classification")
    for number, panel in enumerate(kinds):
        left = 30 + number * (CLIENT[0] + 30)
        parts += _client(panel, left, top)
        across = left + CLIENT[0] / 2
        start = middle + (number - 1) * 60
        parts += _arrow(start - 9, below + 4, across - 9, top - 5, "arrow", "head")
        parts += _arrow(across + 9, top - 4, start + 9, below + 5, "arrow up", "up-head")
    steps = (
        (x - 214, y + 44, "1", "sends the adapter"),
        (30, top + CLIENT[1] + 26, "2", "each trains some layers on its own texts"),
        (x - 214, y + 74, "3", "gets the trained layers"),
        (x + width + 24, y + 59, "4", "takes their mean"),
    )
    discs = {"1": "head", "3": "up-head"}
    for left, line, digit, words in steps:
        disc = discs.get(digit, "disc")
        parts += [
            f'<circle class="{disc}" cx="{left + 10:g}" cy="{line - 5:g}" r="10"/>',
            text(left + 10, line - 0.5, digit, "number", "middle"),
            text(left + 28, line, words),
        ]
    bottom = top + CLIENT[1] + 26
    parts += _legend([Mode.TRAIN, Mode.FORWARD], 470, bottom)
    label = "A server sends an adapter to three clients, and merges the layers that they train"
    return picture(label, bottom + 20, parts)


def _client(panel: Panel, left: float, top: float) -> list[str]:
    """A client's box: its device, its texts, and the modes of its layers in the first step."""
    modes = panel.steps[0][:: LAYERS // BLOCKS]
    return [
        rectangle(left, top, *CLIENT, "box", corner=10),
        text(left + CLIENT[0] / 2, top + 24, panel.title, "bold", "middle"),
        *_stack(modes, left + 72, top + 40, CLIENT[0] - 88),
        *_papers(left + 18, top + 62),
        text(left + 34, top + 132, "texts", "soft", "middle"),
    ]


def _stack(modes: Sequence[Mode], x: float, y: float, width: float) -> list[str]:
    """Layers as bars, the first one lowest."""
    return [
        rectangle(x, y + 20 * place, width, 14, mode.value, corner=4)
        for place, mode in enumerate(reversed(modes))
    ]


def _papers(x: float, y: float) -> list[str]:
    """Three sheets of paper."""
    parts = [rectangle(x + shift, y + 8 - shift, 26, 34, "paper", corner=3) for shift in (8, 4, 0)]
    lines = "".join(f"M{x + 5:g} {y + 16 + 6 * line:g}h16" for line in range(4))
    return [*parts, f'<path class="line" d="{lines}"/>']


def _arrow(x: float, y: float, to_x: float, to_y: float, kind: str, head: str) -> list[str]:
    """A curve that leaves and arrives vertically, with a triangle at its end."""
    down = 1 if to_y > y else -1
    end = to_y - 8 * down
    middle = (y + end) / 2
    curve = f"M{x:g} {y:g}C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {end:g}"
    tip = f"M{to_x - 5:g} {end:g}h10L{to_x:g} {to_y:g}z"
    return [f'<path class="{kind}" d="{curve}"/>', f'<path class="{head}" d="{tip}"/>']


if __name__ == "__main__":
    main()
