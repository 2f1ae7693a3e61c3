"""What a second worker brings, and a run beside other work.

    python -m benchmarks.speed.workers

`droppeft run` with one worker and with two, alternately: rows that clients train on per second of a
round, evaluation, merging and saving included (`host_wall_s`); the first round is left out. There
are eight clients in a round, all equal (LoRA in all layers), so that they can be divided by two.

In each turn the run with two workers is repeated beside three processes that keep cores busy. Its
fair share follows from the number of processes that want a core: w workers and three others on c
cores take (w + 3) / c times as long as w workers alone, if w is at most c.

Writes the table `workers`. About nine minutes on two cores, nothing else running.
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.measuring import (
    Arm,
    Rows,
    alternate,
    arguments,
    middle,
    ratios,
    write_part,
)
from benchmarks.speed.processes import busy_processes, rows_of, run_droppeft
from droppeft.config import available_cores

PART = "workers"
BUSY = 3
ONE, TWO, BESIDE = "1 worker", "2 workers", f"2 workers beside {BUSY} busy processes"
SETTINGS = (
    *("method=fedlora", "clients=20", "cohort_size=8", "partition.kind=iid"),
    *("evaluation.personalised=false", "evaluation.final_rows=64"),
)
SIZES = ("rounds=3", "training.local_steps=4")


def measure(repeats: int, sizes: tuple[str, ...] = SIZES, busy: bool = True) -> Rows:
    """Rows of all arms, in which `row_s` is the seconds of a round for each row."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {ONE: _run(folder, sizes, 1), TWO: _run(folder, sizes, 2)}
        if busy:
            arms[BESIDE] = _run(folder, sizes, 2, BUSY)
        return alternate(arms, repeats, warm_up=False)


def _run(folder: str, sizes: tuple[str, ...], workers: int, busy: int = 0) -> Arm:
    def run() -> dict[str, Any]:
        with (
            tempfile.TemporaryDirectory(dir=folder) as place,
            busy_processes(busy) if busy else nullcontext(),
        ):
            out = Path(place) / "run"
            took = run_droppeft([*SETTINGS, *sizes, f"workers={workers}"], out)
            rounds, clients = rows_of(out, "rounds"), rows_of(out, "clients")
        later = [row for row in rounds if row["round"] > 1]
        trained = sum(row["rows"] for row in clients if row["round"] > 1)
        seconds = sum(row["host_wall_s"] for row in later)
        merging = [
            row["round_measured_s"]
            - max(one["total_wall_s"] for one in clients if one["round"] == row["round"])
            for row in later
        ]
        return {
            "row_s": seconds / trained,
            "wall_s": took.wall_s,
            "cpu_s": took.cpu_s,
            "evaluation_share": sum(row["evaluation_wall_s"] for row in later) / seconds,
            "saving_share": sum(row["saving_wall_s"] for row in later) / seconds,
            "merging_share": sum(merging) / seconds,
        }

    return run


def fair_share(workers: int, busy: int, cores: int) -> float:
    """How many times as long workers take beside busy processes, if all get the same time."""
    alone = min(workers, cores) / workers
    beside = min(1.0, cores / (workers + busy))
    return alone / beside


def main() -> None:
    repeats = arguments(__doc__).parse_args().repeats
    rows = measure(repeats)
    faster = ratios(rows, ONE, TWO, "row_s")
    slower = ratios(rows, BESIDE, TWO, "row_s")
    fair = fair_share(2, BUSY, available_cores())
    print(f"rows per second, 2 workers of 1: {median(faster):.2f} {sorted(faster)}")
    print(f"beside {BUSY}: {median(slower) / fair:.2f} of the fair share {fair:.2f}")
    print(f"saving {middle(rows, TWO, 'saving_share'):.4f} of a round")
    write_part(PART, {"settings": [*SETTINGS, *SIZES], "busy": BUSY, "fair_share": fair}, rows)


if __name__ == "__main__":
    main()
