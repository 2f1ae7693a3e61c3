"""The parts of the results about costs: estimated and measured, frozen layers, savings together."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from tables import markdown_table, processor, read_table, read_values

Row = Mapping[str, Any]

COST_MODEL_HEAD = """\
## What was estimated, and what it took

`benchmarks/cost_model`: memory and time of a step as `droppeft estimate` gives them (modelled),
and what fresh processes took (measured). Memory: the resident peak of a process that returns all
freed memory, less what it had before the model; what glibc's malloc holds beyond that by default is
in the last column. Largest error: {memory}. Time: medians of {trials} trials; for each model one
speed and one overhead per step are fitted to its cells, so that the errors are those of the fit.
Largest: {time}. Quantised and offloaded weights are read by other kernels or from other places, and
their time is not modelled. Cells with frozen layers and all of BERT-large were measured again after
a mistake in the trial was corrected, and two cells whose trials disagreed were measured once more:
the file has the commands. Made on {place}; another process was busy on the other core.

![Modelled against measured: memory and time of a step](figures/cost_model.png)
"""
COST_MODEL_COLUMNS = (
    *("cell", "memory measured", "modelled", "error"),
    *("step measured", "modelled", "error", "held by malloc (measured)"),
)

SAVINGS_HEAD = """\
## Memory of training, savings alone and together

The same measurements, against LoRA in all layers at full depth: what the model and its training
add to a process (measured), the same with the {process:.1f} GB of the process itself, and at
batches of 16 texts of 128 tokens (modelled; measured at {batch}).
The paper reports 40 to 67 % for dropout alone on its devices. A rate of .5 is exact, without
protected ends; *per turn* means that a draw holds for a client's whole local training; *offload* is
`training.offload=true`. Measured is the worse of the first and of later uses of a row.
"""
SAVINGS_COLUMNS = ("savings", "memory measured", "less", "less, with process", "less at 16 x 128")

FROZEN_LAYERS_HEAD = """\
## Frozen first layers

`benchmarks/frozen_layers`: one training step with LoRA of rank 8 in the layers behind the frozen
ones, against LoRA in all layers at full depth; arms alternate. *No cache*: LoRA in the last
layers, the first run forward in every step. *First visit*: the hidden states are computed row by
row and stored. *Later visit*: the states are on the disk. The limit is the share of layers that
still run. Medians of {repeats} ratios with quartiles, all measured, on {place}; another process
was busy on the other core.

![Step time and stored bytes against the number of frozen layers](figures/frozen_layers.png)
"""
FROZEN_LAYERS_COLUMNS = (
    *("frozen", "visit", "dropped", "limit", "step time", "stored for the backward"),
    *("making states", "on disk per example"),
)


MATRIX_KERNELS_HEAD = """\
## MKL's kernels on a processor that is not Intel's

`benchmarks/matrix_kernels`: processes with and without one preloaded line of C alternate, on
{place}, while other work ran on the machine. GFLOP/s of (rows, in) x (in, out), and processor
seconds of a local training of ten steps with the built-in model; medians of {repeats}, in brackets
the best.
"""


def cost_sections() -> list[str]:
    """A section per study, and the savings that the cost model's cells show."""
    return [_cost_model(), _savings(), _frozen_layers(), _matrix_kernels()]


def _cost_model() -> str:
    rows = read_table("cost_model")
    timed = [row for row in rows if row["time_error"] is not None]
    trials = Counter(row["cell"] for row in read_table("cost_model", "trials"))
    head = COST_MODEL_HEAD.format(
        memory=f"{max(abs(row['memory_error']) for row in rows):.1%}",
        time=f"{max(abs(row['time_error']) for row in timed):.0%}",
        trials=_range(trials[row["cell"]] - 1 for row in timed),
        place=_place(read_values("cost_model")["machine"]),
    )
    lines = [
        [
            row["cell"],
            _megabytes(row["measured_bytes"]),
            _megabytes(row["modelled_bytes"]),
            f"{row['memory_error']:+.1%}",
            *(_times(row) if row in timed else ["–"] * 4),
        ]
        for row in rows
    ]
    return f"{head}\n{markdown_table(COST_MODEL_COLUMNS, lines)}"


def _range(counts: Iterable[int]) -> str:
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _times(row: Row) -> list[str]:
    return [
        f"{row['step_s']:.2f} s",
        f"{row['step_modelled_s']:.2f} s",
        f"{row['time_error']:+.0%}",
        _megabytes(row["kept_by_malloc_bytes"]),
    ]


def _savings() -> str:
    rows = read_table("cost_model")
    by_model: dict[str, dict[str, Row]] = {}
    for row in rows:
        model, _, cell = row["cell"].partition(", ")
        by_model.setdefault(model, {})[cell] = row
    batches = {model: _batch(next(iter(cells.values()))) for model, cells in by_model.items()}
    process = [row["process_bytes"] for row in rows]
    batch = "; ".join(f"{model} {size}" for model, size in batches.items())
    parts = [SAVINGS_HEAD.format(process=max(process) / 1e9, batch=batch)]
    for model, cells in by_model.items():
        full = cells["rate 0"]
        lines = [_saving(cell, row, full) for cell, row in cells.items() if _is_shown(cell)]
        parts += [f"### {model}\n", markdown_table(SAVINGS_COLUMNS, lines)]
    return "\n".join(parts)


def _is_shown(cell: str) -> bool:
    """All at rate .5, and each saving without it."""
    return not re.match(r"rate 0\.[27]5", cell)


def _saving(cell: str, row: Row, full: Row) -> Sequence[str]:
    def less(key: str, besides: int = 0) -> str:
        return f"{1 - (row[key] + besides) / (full[key] + besides):.0%}"

    name = cell.removeprefix("rate 0, ").replace("rate 0.5", "half dropped")
    return (
        "none" if cell == "rate 0" else name,
        _megabytes(row["measured_bytes"]),
        less("measured_bytes"),
        less("measured_bytes", full["process_bytes"]),
        less("modelled_16x128_bytes"),
    )


def _batch(row: Row) -> str:
    return f"{row['batch_size']} x {row['length']}"


def _frozen_layers() -> str:
    content, rows = read_values("frozen_layers"), read_table("frozen_layers")
    models = content["models"]
    repeats = min(model["repeats"] for model in models.values())
    parts = [FROZEN_LAYERS_HEAD.format(repeats=repeats, place=_place(content["machine"]))]
    for name, model in models.items():
        batch = f"{model['batch_size']} x {model['length']} tokens"
        title = f"### {name}, {model['layers']} layers, {batch}"
        lines = [_frozen_row(row) for row in rows if row["model"] == name]
        parts += [f"{title}\n", markdown_table(FROZEN_LAYERS_COLUMNS, lines)]
    return "\n".join(parts)


def _frozen_row(row: Row) -> Sequence[str]:
    stored = row["disk_bytes_per_example"]
    within = f"{row['time_ratio_low']:.3f} to {row['time_ratio_high']:.3f}"
    return (
        str(row["frozen"]),
        row["visit"] if row["frozen"] else "–",
        str(row["dropped"]),
        f"{row['limit']:.3f}",
        f"{row['time_ratio']:.3f} ({within})",
        f"{row['stored_ratio']:.3f}",
        f"{row['build_s']:.2f} s" if row["visit"] != "no cache" else "–",
        f"{stored / 1e3:,.0f} kB" if stored else "–",
    )


def _matrix_kernels() -> str:
    content = read_values("matrix_kernels")
    runs: Mapping[str, Sequence[Row]] = content["runs"]
    repeats = min(map(len, runs.values()))
    head = MATRIX_KERNELS_HEAD.format(place=_place(content["machine"]), repeats=repeats)
    shapes = [f"({n}, {inner}) x ({inner}, {out})" for n, inner, out in content["shapes"]]
    lines = []
    for name, found in runs.items():
        speeds = zip(*(one["gflops"] for one in found), strict=True)
        seconds = [one["training_s"] for one in found]
        shown = [f"{median(speed):.0f} ({max(speed):.0f})" for speed in speeds]
        lines.append((name, *shown, f"{median(seconds):.2f} s ({min(seconds):.2f})"))
    return f"{head}\n{markdown_table(('kernels', *shapes, 'training'), lines)}"


def _place(machine: Row) -> str:
    return f"{processor(machine)}, one thread"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"
