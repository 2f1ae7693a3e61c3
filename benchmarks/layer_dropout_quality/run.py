"""What dropping layers costs in accuracy: one client, development data, many small trainings.

    python -m benchmarks.layer_dropout_quality.run $DROPPEFT_DATA              # hours; goes on
    python -m benchmarks.layer_dropout_quality.run $DROPPEFT_DATA --models builtin --worker 0/2

A cell is one training: a model, a seed and a CONDITION, which changes one or two settings of the
CENTRE. It is measured after BUDGET steps (*equal steps*) and after as many steps as cost what
BUDGET steps at full depth cost (*equal work*: tokens times layers that ran); a schedule over the
run needs one run for each. Quality is measured at full depth on DEV_ROWS rows that are cut from
the training part of QQP; no test text is read. Every finished cell adds its rows to the table
`result`, one per budget; what is there is not run again. Cells are ordered by importance, so that
an unfinished study is of use. One thread; CPU seconds are the process's own, so that several
workers may share a machine.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.study import FOLDER, about, append_rows, read_table, write_values
from droppeft import seeds
from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import trainable_by_layer
from droppeft.cached_layers import FrozenLayers
from droppeft.cached_layers.cached_layers import CachedLayers
from droppeft.config import Config, SourceConfig, available_cores
from droppeft.data.cache import cache_dir
from droppeft.data.sources import load_text
from droppeft.data.texts import TextData, TextTable
from droppeft.data.tokens import tokenise
from droppeft.federated_method import local_training
from droppeft.layer_dropout import find_blocks, layer_rates, protected_ends
from droppeft.layer_dropout.dropout import modes_of_step
from droppeft.layer_dropout.modes import Mode
from droppeft.layer_dropout.options import GateOptions
from droppeft.messages.instruction import AdapterSpec, Budget, LayerAdapter
from droppeft.models.loading import load_backbone
from droppeft.tasks.classification import Classification
from droppeft.training.loop import Step, Trainable, evaluate, train, training_batches

NAME = "layer_dropout_quality"
BUDGET, WARM_UP, TURN, BATCH, DEV_ROWS = 160, 20, 40, 16, 1500
SIZES = {"budget_steps": BUDGET, "warm_up_steps": WARM_UP, "development_rows": DEV_ROWS}
MODELS = ("builtin", "deep12", "deep24")

CENTRE: dict[str, Any] = {
    "mean": 1 / 3,
    "shape": "uniform",
    "sampling": "exact",
    "protect": (1, 1),
    "every": 1,
    "schedule": "constant",
    "learning_rate": 1e-3,
    "frozen": 0.0,
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "full depth": {"mean": 0.0},
    "third": {},
    "half": {"mean": 1 / 2},
    "half, recovery": {"mean": 1 / 2, "schedule": "recovery"},
    "half, no protection": {"mean": 1 / 2, "protect": (0, 0)},
    "half, bernoulli": {"mean": 1 / 2, "sampling": "bernoulli"},
    "third, recovery": {"schedule": "recovery"},
    "two thirds": {"mean": 2 / 3},
    "third, no protection": {"protect": (0, 0)},
    "third, incremental": {"shape": "incremental"},
    "third, decay": {"shape": "decay"},
    "third, per turn": {"every": TURN},
    "full depth, double rate": {"mean": 0.0, "learning_rate": 2e-3},
    "third, double rate": {"learning_rate": 2e-3},
    "third, normal": {"shape": "normal"},
    "third, bernoulli": {"sampling": "bernoulli"},
    "full depth, half rate": {"mean": 0.0, "learning_rate": 5e-4},
    "third, half rate": {"learning_rate": 5e-4},
}
"""Condition by name, most important first: what differs from CENTRE."""
FROZEN: dict[str, dict[str, Any]] = {
    "half frozen": {"mean": 0.0, "frozen": 1 / 2},
    "quarter frozen": {"mean": 0.0, "frozen": 1 / 4},
    "three quarters frozen": {"mean": 0.0, "frozen": 3 / 4},
    "half frozen, a third of the rest dropped": {"frozen": 1 / 2, "protect": (0, 1)},
}
"""First layers without adapters, in evaluation mode and never dropped; the mean is of the rest."""

WAVES: tuple[tuple[str, slice, tuple[int, ...]], ...] = (
    ("builtin", slice(9), (0, 1, 2)),
    ("deep12", slice(5), (0, 1, 2)),
    ("deep24", slice(3), (0,)),
    ("builtin", slice(9, 14), (0, 1, 2)),
    ("builtin", slice(14, None), (0, 1, 2)),
)
"""Model, which of the CONDITIONS, seeds: in this order."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    model: str
    condition: str
    seed: int
    ends: str
    """``both`` kinds of budget, or for a schedule ``steps`` or ``work``."""

    settings: dict[str, Any] = field(compare=False)

    @property
    def key(self) -> tuple[str, str, int, str]:
        return (self.model, self.condition, self.seed, self.ends)


def cells(models: list[str]) -> Iterator[Cell]:
    """Every cell, by importance."""
    for model, chosen, wave_seeds in WAVES:
        for seed, name in itertools.product(wave_seeds, list(CONDITIONS)[chosen]):
            settings = {**CENTRE, **CONDITIONS[name]}
            scheduled = settings["schedule"] != "constant"
            for ends in ("work", "steps") if scheduled else ("both",):
                if model in models:
                    yield Cell(model, name, seed, ends, settings)


def frozen_cells(models: list[str]) -> Iterator[Cell]:
    """With frozen first layers, at equal steps: what a step costs depends on what is cached."""
    for seed, model, (name, changes) in itertools.product(range(3), models, FROZEN.items()):
        yield Cell(model, name, seed, "steps", {**CENTRE, **changes})


def steps_of(cell: Cell) -> dict[str, int]:
    """After how many steps a budget is used up."""
    part = {"constant": 1.0, "recovery": 0.7, "warm_up": 0.85}[cell.settings["schedule"]]
    work = round(BUDGET / (1 - part * cell.settings["mean"]))
    found = {"steps": BUDGET, "work": work}
    return found if cell.ends == "both" else {cell.ends: found[cell.ends]}


def run(cell: Cell, data: TextData, model_path: str, dev: TextTable) -> dict[str, Any]:
    """Train and measure one cell."""
    settings = cell.settings
    backbone = load_backbone(
        model_path, data.label_names, seeds.seed_for(cell.seed, purpose="head")
    )
    depth = backbone.num_layers
    frozen = round(settings["frozen"] * depth)
    lora = LayerAdapter("lora", rank=8)
    spec = AdapterSpec((None,) * frozen + (lora,) * (depth - frozen), alpha=16.0)
    model = attach(backbone.model, spec, backbone.blocks_path, cell.seed)
    path, blocks = find_blocks(model)
    parameters = trainable_by_layer(model, path)
    task = Classification(backbone.inputs, backbone.tokenizer.pad_token_id, torch.device("cpu"))
    table, dev_table = (
        tokenise(texts, backbone.tokenizer, 128, cache_dir()) for texts in (data.train, dev)
    )
    rates = (0.0,) * frozen + layer_rates(
        settings["mean"],
        settings["shape"],
        depth - frozen,
        protected=protected_ends(depth - frozen, *settings["protect"]),
    )
    stops = steps_of(cell)
    total = max(stops.values())
    learning_rate = settings["learning_rate"]
    chosen = {"learning_rate": learning_rate, "head_learning_rate": 10 * learning_rate}
    training = local_training(Config.model_validate({"training": chosen}))
    rng = np.random.default_rng(cell.seed)
    rows = training_batches(np.arange(len(table)), table, BATCH, Budget(steps=total), rng)
    torch.manual_seed(cell.seed)
    options: GateOptions = {
        "sampling": settings["sampling"],
        "seed": cell.seed,
        "every": settings["every"],
        "schedule": settings["schedule"],
        "total_steps": total,
    }
    gates = [modes_of_step(step, rates, options) for step in range(total)]
    found: dict[str, Any] = {}
    cpu_s = work = 0.0
    peak = 0
    borders = sorted({*range(0, total, TURN), *stops.values(), total})
    for start, stop in itertools.pairwise(borders):
        batches = [task.collate(table, chosen) for chosen in rows[start:stop]]
        factors = [min(1.0, (step + 1) / WARM_UP) for step in range(start, stop)]
        before = time.process_time()
        steps = [
            Step([batch], modes, factor)
            for batch, modes, factor in zip(batches, gates[start:stop], factors, strict=True)
        ]
        outcome = train(
            Trainable(model, blocks, parameters, task),
            steps,
            training,
            cached=None
            if frozen == 0
            else CachedLayers(
                FrozenLayers(model, blocks, frozen),
                None,
                table,
                task,
                rows[start:stop],
                nullcontext,
            ),
        )
        cpu_s += time.process_time() - before
        for batch, modes in zip(batches, gates[start:stop], strict=True):
            work += batch["input_ids"].numel() * modes.count(Mode.TRAIN) / depth
        peak = max(peak, outcome.activation_bytes_peak)
        reached = [name for name, at in stops.items() if at == stop]
        if reached:
            measured = evaluate(model, dev_table, np.arange(len(dev_table)), task, 64)
            here = {
                "step": stop,
                "accuracy": measured.metrics["accuracy"],
                "f1": measured.metrics["f1"],
                "loss": measured.loss,
                "train_loss": outcome.loss,
                "full_depth_tokens": work,
                "train_cpu_s": cpu_s,
                "activation_bytes_peak": peak,
                "most_active_layers": max(modes.count(Mode.TRAIN) for modes in gates[:stop]),
            }
            found |= dict.fromkeys(reached, here)
    return found


def development(folder: Path) -> tuple[TextData, TextTable]:
    """QQP's training texts without the rows that are cut off to measure on."""
    data = load_text(str(folder / "qqp"), SourceConfig())
    order = np.random.default_rng(0).permutation(len(data.train))
    train, dev = data.train.take(order[DEV_ROWS:]), data.train.take(order[:DEV_ROWS])
    return TextData("qqp, cut from train", train, train, data.label_names), dev


def finished() -> set[tuple[Any, ...]]:
    """Keys of the cells in the table."""
    if not (FOLDER / NAME / "result.csv.gz").exists():
        return set()
    rows = read_table(NAME)
    return {(row["model"], row["condition"], row["seed"], row["ends"]) for row in rows}


def write(cell: Cell, measured: dict[str, Any]) -> None:
    """Add a cell's rows, one for each budget."""
    first, last = cell.settings["protect"]
    settings = {key: value for key, value in cell.settings.items() if key != "protect"}
    key = {"model": cell.model, "condition": cell.condition, "seed": cell.seed, "ends": cell.ends}
    setting = {**settings, "protect_first": first, "protect_last": last, "cores": available_cores()}
    rows = [{**key, **setting, "budget": budget, **found} for budget, found in measured.items()]
    append_rows(NAME, "result", rows)


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with qqp, deep12 and deep24")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--frozen", action="store_true", help="the cells of FROZEN instead")
    parser.add_argument("--worker", default="0/1", help="i/n: of n processes this is number i")
    arguments = parser.parse_args()
    worker, workers = map(int, arguments.worker.split("/"))
    torch.set_num_threads(1)
    data, dev = development(arguments.data)
    write_values(
        NAME, {**about(NAME, data=arguments.data), "data_hash": data.content_hash, **SIZES}
    )
    chosen = (frozen_cells if arguments.frozen else cells)(arguments.models)
    for cell in itertools.islice(chosen, worker, None, workers):
        if cell.key in finished():
            continue
        path = "builtin" if cell.model == "builtin" else str(arguments.data / cell.model)
        print(*cell.key, sep=", ", end=": ", flush=True)
        measured = run(cell, data, path, dev)
        write(cell, measured)
        last = measured[max(measured, key=lambda name: measured[name]["step"])]
        print(f"{last['accuracy']:.3f} after {last['train_cpu_s']:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
