"""Memory and time of a step: how far `droppeft estimate` is from `droppeft profile`.

    OMP_NUM_THREADS=1 DROPPEFT_DATA=... python -m benchmarks.cost_model.run

Every cell of a stated grid is measured in fresh processes as `droppeft profile` does it, and
modelled as `droppeft estimate` does it.

Memory: peak resident memory of a process that returns freed memory to the system at once, less what
it had after a first small local training: libraries, tokenizer, workspaces. What glibc holds by
default is measured separately, in the processes that measure
time; it is no property of the model and is not modelled.

Time: cells alternate, with several trials each; medians. For each model the speed and the overhead
per step of this machine are fitted to its fp32 cells by
`benchmarks.clock_calibration.run.calibrated`; errors are those of the fit. Quantised weights are
excluded, because their kernels have another speed, and so are weights that are mapped from a file.

Writes the tables `result` (a row per cell) and `trials`, and `study.json`; `make results` draws
them. About an hour on 2 cores, nothing else running. `--cells WORD` measures only cells with this
in their name again.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.clock_calibration.run import calibrated
from benchmarks.study import about, read_table, read_values, was_measured, write_table, write_values
from droppeft.config import Config, load_config, resolve
from droppeft.costs.step_memory import Memory
from droppeft.resources.estimate import Option, mean_flops, option
from droppeft.resources.profile_run import ProfileRun
from droppeft.resources.profiling import in_fresh_process

NAME = "cost_model"
STEPS = 3
SETTINGS = (
    *("method=droppeft", "accelerator=cpu", "threads=1"),
    *("training.precision=fp32", "training.backbone_dropout=true"),  # the defaults when it ran
    *("dropout.protect_first=0", "dropout.protect_last=0"),
)
MODELS = {
    "builtin": ("model=builtin", "training.batch_size=16", "training.max_length=128"),
    "deep12": (
        "model=$DROPPEFT_DATA/deep12",
        "training.batch_size=16",
        "training.max_length=128",
    ),
    "bert-large": ("model=config:bert-large", "training.batch_size=4", "training.max_length=64"),
}
USUAL = ("training.batch_size=16", "training.max_length=128")
"""A batch of the paper's size, too slow to be measured in every cell of BERT-large."""

HALF = {"builtin": 3, "deep12": 6, "bert-large": 12}


def cells() -> dict[str, tuple[str, ...]]:
    """Name to settings: rates alone, every other saving with and without half, and all together."""
    found = {}
    for model, words in MODELS.items():
        plain = {"": (), ", checkpointing": ("training.checkpointing=true",)}
        frozen = {f", {HALF[model]} frozen": (f"frozen.layers={HALF[model]}",)}
        small = {f", {kind}": (f"quantization={kind}",) for kind in ("8bit", "4bit")}
        for name, more in {**plain, **frozen, **small}.items():
            for rate in (0, 0.25, 0.5, 0.75) if name == "" else (0, 0.5):
                found[f"{model}, rate {rate}{name}"] = (*words, *more, f"dropout.mean={rate}")
        for name, more in together(HALF[model]).items():
            found[f"{model}, {name}"] = (*words, *more)
    return found


def together(half: int) -> dict[str, tuple[str, ...]]:
    """Savings that need one another, and all that can be combined; rate .5 unless a name says 0."""
    drop, frozen = ("dropout.mean=0.5",), (f"frozen.layers={half}",)
    per_round, off = ("dropout.every=round",), ("training.offload=true",)
    lean = (*drop, *frozen, "training.checkpointing=true")
    return {
        f"rate 0, {half} frozen, offload": ("dropout.mean=0", *frozen, *off),
        "rate 0.5 per turn, offload": (*drop, *per_round, *off),
        f"rate 0.5 per turn, {half} frozen, offload, checkpointing": (*lean, *per_round, *off),
        f"rate 0.5, {half} frozen, checkpointing, 8bit": (*lean, "quantization=8bit"),
        f"rate 0.5, {half} frozen, checkpointing, 4bit": (*lean, "quantization=4bit"),
    }


def configuration(words: Sequence[str]) -> Config:
    opened = [os.path.expandvars(word) for word in (*SETTINGS, *words)]
    return resolve(load_config(None, opened), cuda=False)


def measure(chosen: Mapping[str, Sequence[str]], repeats: int) -> dict[str, list[ProfileRun]]:
    """Trials of every cell, first the one that measures memory; cells alternate."""
    found: dict[str, list[ProfileRun]] = {name: [] for name in chosen}
    for repeat in range(repeats + 1):
        for number, (name, words) in enumerate(chosen.items()):
            if repeat > 0 and unlike(name):
                continue
            trial = in_fresh_process(configuration(words), STEPS, release_memory=repeat == 0)
            found[name].append(trial)
            print(f"{repeat}/{repeats}, {number + 1}/{len(chosen)}: {name}", file=sys.stderr)
    return found


def compared(name: str, words: Sequence[str], trials: Sequence[ProfileRun]) -> dict[str, Any]:
    """One cell: modelled beside measured."""
    config = configuration(words)
    modelled: Option = option(config, None)
    frugal, *timed = trials
    measured = frugal.peak_bytes - frugal.process_bytes
    memory: Memory = modelled.memory
    return {
        "cell": name,
        "settings": " ".join(words),
        "batch_size": config.training.batch_size,
        "length": config.training.max_length,
        "modelled_bytes": memory.model,
        "measured_bytes": measured,
        "memory_error": memory.model / measured - 1,
        **{f"{key}_bytes": value for key, value in vars(memory).items() if key != "process"},
        "process_bytes": frugal.process_bytes,
        "kept_by_malloc_bytes": max(one.peak_bytes for one in timed) - frugal.peak_bytes
        if timed
        else None,
        "activation_bytes_peak": max(one.activation_bytes_peak for one in trials),
        "flops": mean_flops(config),
        "step_s": statistics.median(one.step_s for one in timed) if timed else None,
        "modelled_16x128_bytes": option(configuration((*words, *USUAL)), None).memory.model,
    }


def with_times(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit the speed at which this machine does a model; put modelled times beside measured ones."""
    fits = {}
    for model in MODELS:
        cells = [row for row in rows if row["cell"].startswith(model) and not unlike(row["cell"])]
        if cells:
            speed, overhead = calibrated([r["flops"] for r in cells], [r["step_s"] for r in cells])
            fits[model] = {"effective_flops_per_s": speed, "step_overhead_s": overhead}
            for row in cells:
                row["step_modelled_s"] = row["flops"] / speed + overhead
                row["time_error"] = row["step_modelled_s"] / row["step_s"] - 1
    return fits


def unlike(cell: str) -> bool:
    """Whether its weights are read by other kernels or from other places than a plain step's."""
    return "bit" in cell or "offload" in cell


def write(chosen: Mapping[str, Sequence[str]], trials: Mapping[str, Sequence[ProfileRun]]) -> None:
    """Add measured cells to those in the result."""
    known = was_measured(NAME)
    commands = read_values(NAME)["commands"] if known else []
    rows, repeats = (
        [row for row in read_table(NAME, table) if row["cell"] not in chosen] if known else []
        for table in ("result", "trials")
    )
    rows += [compared(name, words, trials[name]) for name, words in chosen.items()]
    repeats += [
        {"cell": name, "trial": number, "frugal": number == 0, **vars(trial)}
        for name in chosen
        for number, trial in enumerate(trials[name])
    ]
    order = list(cells())
    rows.sort(key=lambda row: order.index(row["cell"]))
    repeats.sort(key=lambda row: (order.index(row["cell"]), row["trial"]))
    found = about(NAME)
    content = {
        **found,
        "commands": [*commands, found["command"]],
        "machine": {**found["machine"], "threads": 1},
        "settings": SETTINGS,
        "steps_per_trial": STEPS,
        "fits": with_times(rows),
    }
    write_values(NAME, content)
    write_table(NAME, "result", rows)
    write_table(NAME, "trials", repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="trials per cell that measure time")
    parser.add_argument("--cells", default="", help="only cells with this in their name")
    arguments = parser.parse_args()
    chosen = {name: words for name, words in cells().items() if arguments.cells in name}
    write(chosen, measure(chosen, arguments.repeats))
    for row in read_table(NAME):
        time = "" if row["time_error"] is None else f"  time {row['time_error']:+.1%}"
        print(f"{row['cell']:40} memory {row['memory_error']:+.1%}{time}")


if __name__ == "__main__":
    main()
