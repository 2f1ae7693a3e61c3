"""How long commands take to start, and the partition of a large federation.

    python -m benchmarks.speed.start_up

- `droppeft --help`, the whole command;
- `droppeft run`: seconds from the start of the process to the first training step of round 1, on
  the built-in task with warm caches. The process notes the time when a client begins to train;
- importing torch and transformers, which is part of it;
- 100,000 rows partitioned among 10,000 clients.

Writes the table `start_up`. About three minutes on two cores, nothing else running.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.measuring import Arm, Rows, alternate, arguments, middle, write_part
from benchmarks.speed.processes import EVERY_CORE, droppeft, run_command
from droppeft.config import PartitionConfig
from droppeft.data.partition import partition_rows

PART = "start_up"
HELP, FIRST = "droppeft --help", "droppeft run, until its first training step"
ROWS, CLIENTS, CLASSES = 100_000, 10_000, 10
RUN = (
    *("rounds=1", "training.local_steps=1", "evaluation.rows=16", "evaluation.final_rows=16"),
    "evaluation.personalised=false",
)

FIRST_STEP = """
import sys, time
from droppeft.client import local_training
from droppeft.cli import main

train, place = local_training.train, sys.argv.pop(1)

def noted(*arguments, **options):
    with open(place, "a", encoding="utf-8") as file:
        file.write(f"{time.time()}\\n")
    return train(*arguments, **options)

local_training.train = noted
main()
"""
"""A program that is `droppeft`, but writes to a file when clients begin to train."""


def measure(repeats: int) -> Rows:
    """Rows of all arms."""
    _first_step()  # fills the caches
    arms: dict[str, Arm] = {
        HELP: _command(droppeft("--help")),
        FIRST: _first_step,
        "import torch": _command((sys.executable, "-c", "import torch")),
        "import transformers": _command(
            (sys.executable, "-c", "from transformers import AutoModelForSequenceClassification")
        ),
        f"partition of {ROWS:,} rows among {CLIENTS:,} clients": _partition,
    }
    return alternate(arms, repeats, warm_up=False)


def _command(words: tuple[str, ...]) -> Arm:
    def run() -> dict[str, Any]:
        took = run_command(words)
        return {"seconds": took.wall_s, "cpu_s": took.cpu_s}

    return run


def _first_step() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        place, out = Path(folder) / "times", Path(folder) / "run"
        words = (sys.executable, "-c", FIRST_STEP, str(place), "run", *RUN, "--out", str(out))
        start = time.time()
        took = run_command(words, environment=EVERY_CORE)
        first = float(place.read_text(encoding="utf-8").split()[0])
    return {"seconds": first - start, "cpu_s": took.cpu_s}


def _partition() -> dict[str, Any]:
    labels = np.random.default_rng(0).integers(CLASSES, size=ROWS)
    config = PartitionConfig(kind="dirichlet", min_rows=3)
    start = time.perf_counter()
    partition_rows(labels, None, CLIENTS, config, 0)
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    rows = measure(arguments(__doc__).parse_args().repeats)
    for arm in dict.fromkeys(row["variant"] for row in rows):
        print(f"{arm}: {middle(rows, arm, 'seconds'):.2f} s")
    write_part(PART, {"run": RUN}, rows)


if __name__ == "__main__":
    main()
