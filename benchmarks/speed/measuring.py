"""What the parts of this study have in common: arms that alternate, and where results go.

A machine that others use changes its speed from minute to minute. So the arms of a comparison take
turns (A B C, A B C, ...), and what is compared are ratios within a turn.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.study import about, read_table, read_values, was_measured, write_table, write_values

NAME = "speed"
REPEATS = 5

Rows = list[dict[str, Any]]
Arm = Callable[[], Mapping[str, Any] | None]
"""Does the work once; what it returns is added to the row of this repeat, or replaces its times."""


def alternate(
    arms: Mapping[str, Arm], repeats: int, *, warm_up: bool = True, **columns: Any
) -> Rows:
    """Run all arms in turn, and return a row for each run.

    Args:
        arms: by name. Time is that of this process, on the clock and on its processors.
        repeats: number of turns.
        warm_up: run every arm once before.
        columns: further columns of all rows.
    """
    for run in arms.values() if warm_up else ():
        run()
    rows: Rows = []
    for repeat in range(repeats):
        for name, run in arms.items():
            gc.collect()
            with timed() as took:
                more = run() or {}
            rows.append({**columns, "variant": name, "repeat": repeat, **took, **more})
            print("{repeat} {variant}: {wall_s:.2f} s, {cpu_s:.2f} s CPU".format(**rows[-1]))
            sys.stdout.flush()
    return rows


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Yield a dictionary that has `wall_s` and `cpu_s` of what was done inside, afterwards."""
    took: dict[str, float] = {}
    start = time.perf_counter(), time.process_time()
    yield took
    took |= {"wall_s": time.perf_counter() - start[0], "cpu_s": time.process_time() - start[1]}


def ratios(rows: Sequence[Mapping[str, Any]], one: str, other: str, column: str) -> list[float]:
    """Values of an arm divided by those of another, repeat by repeat."""
    of = {
        name: {row["repeat"]: row[column] for row in rows if row["variant"] == name}
        for name in (one, other)
    }
    return [of[one][repeat] / of[other][repeat] for repeat in of[one] if repeat in of[other]]


def middle(rows: Sequence[Mapping[str, Any]], variant: str, column: str) -> float:
    """Median of a column over the repeats of an arm."""
    return median(row[column] for row in rows if row["variant"] == variant)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every part has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    return parser


def data_file(name: str) -> str:
    """A folder of `$DROPPEFT_DATA`, as the setting `data`."""
    if "DROPPEFT_DATA" not in os.environ:
        raise SystemExit("set DROPPEFT_DATA to the folder of the data (docs/benchmarks/setup.md)")
    return str(Path(os.environ["DROPPEFT_DATA"]) / name)


def rows_so_far(part: str) -> Rows:
    """The rows of a part that were measured before."""
    measured = was_measured(NAME) and part in read_values(NAME)
    return read_table(NAME, part) if measured else []


def write_part(part: str, settings: Mapping[str, Any], rows: Rows) -> None:
    """Write the rows of a part to a table of its own, and its settings to `study.json`."""
    found = read_values(NAME) if was_measured(NAME) else {}
    origin = {**about(NAME, script=part), "settings": dict(settings)}
    write_table(NAME, part, rows)
    write_values(NAME, {**found, part: origin})
