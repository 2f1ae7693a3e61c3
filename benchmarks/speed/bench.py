"""`make bench`: short forms of this study's comparisons, with the built-in data, on this machine.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.bench

Prints a table of ratios, medians of three repeats that alternate, with the lowest and the highest.
The rows from which it is made go to `build/bench.json`. Other work on the machine blurs the ratios.
A model whose package is not installed is left out. Less than ten minutes on two cores.
"""

import json
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.speed import start_up, step_limit, trainer, workers
from benchmarks.speed.make_run import ROOT
from benchmarks.speed.measuring import Rows, ratios
from benchmarks.study import SCHEMA_VERSION
from droppeft.errors import DroppeftError
from droppeft.runs.environment import machine, versions

REPEATS = 3
BUILTIN = "data=builtin"
STEPS = {"MiniLM": 8, "SmolLM2": 1}
"""By model, the steps of a local training."""


class Line(NamedTuple):
    """A line of the table: what was compared, the values of the repeats, and their unit."""

    what: str
    values: list[float]
    unit: str = "x"


def step_lines(name: str) -> tuple[list[Line], Rows]:
    """A step's time in times of its products and attention."""
    model = step_limit.MODELS[name]
    steps = STEPS[name]
    sizes = model._replace(words=(*model.words, BUILTIN), steps=steps, compiled=False)
    rows = step_limit.measure(name, sizes, REPEATS)
    found = ratios(rows, step_limit.OURS, step_limit.LIMIT, "wall_s")
    return [Line(f"{name}: time of a step / its products and attention", found)], rows


def trainer_lines(name: str) -> tuple[list[Line], Rows]:
    """The time of Trainers in times of droppeft's."""
    comparison = trainer.COMPARISONS[name]
    chosen = {
        key: value
        for key, value in comparison.trainers.items()
        if value.frozen == "fp32" and value != trainer.BY_LENGTH
    }
    words = (*comparison.words, BUILTIN)
    short = comparison._replace(words=words, steps=STEPS[name], trainers=chosen)
    rows = trainer.measure(short, REPEATS, plain=False, model=name)
    first, second = chosen
    named = {first: first, f"{first}, bf16, batches by length": second}
    lines = [
        Line(f"{name}: time of {what} / droppeft", ratios(rows, arm, trainer.OURS, "wall_s"))
        for what, arm in named.items()
    ]
    return lines, rows


def worker_lines() -> tuple[list[Line], Rows]:
    """What a second worker brings."""
    rows = workers.measure(REPEATS, ("rounds=2", "training.local_steps=4"), busy=False)
    found = ratios(rows, workers.ONE, workers.TWO, "row_s")
    return [Line("rows per second: two workers / one worker", found)], rows


def start_lines() -> tuple[list[Line], Rows]:
    """How long commands take to start."""
    rows = start_up.measure(REPEATS)
    lines = [
        Line(name, [row["seconds"] for row in rows if row["variant"] == name], "s")
        for name in (start_up.HELP, start_up.FIRST)
    ]
    return lines, rows


def main() -> None:
    parts: dict[str, Callable[[], tuple[list[Line], Rows]]] = {}
    for name in STEPS:
        parts[f"step_limit {name}"] = lambda name=name: step_lines(name)
        parts[f"trainer {name}"] = lambda name=name: trainer_lines(name)
    parts |= {"workers": worker_lines, "start_up": start_lines}
    table = Table("comparison", "median", "lowest to highest")
    found: dict[str, Rows] = {}
    for part, measure in parts.items():
        try:
            lines, found[part] = measure()
        except DroppeftError as error:
            print(f"{part} is left out: {error}")
            continue
        for what, values, unit in lines:
            ends = f"{min(values):.2f} to {max(values):.2f}"
            table.add_row(what, f"{median(values):.2f} {unit}", ends)
    content = {
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "machine": machine("cpu"),
        "parts": found,
    }
    file = ROOT / "build/bench.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Console().print(table)
    print(f"All repeats are in {file.relative_to(ROOT)}; docs/benchmarks/speed.md explains them.")


if __name__ == "__main__":
    main()
