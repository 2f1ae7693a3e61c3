"""What frozen first layers save: step time and stored bytes against their number.

    python -m benchmarks.frozen_layers.run $DROPPEFT_DATA                   # about 15 minutes
    python -m benchmarks.frozen_layers.run $DROPPEFT_DATA --models deep12 --repeats 3

For BERT-large (random weights) and `deep12`, with the first m layers frozen, in random order: LoRA
in the last L - m layers without a cache, with the first use of a row (its hidden states are
computed alone and stored), and with a later use (they are on the disk), each at full depth and
with half of the layers behind the frozen ones dropped in every step. Beside it the limit: the
share of the layers that still run. All measured, on one thread; ratios to LoRA in all layers of
the same repeat. Writes the tables `result` and `repeats`, and `study.json`; `make results` draws
them.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from benchmarks.study import about, read_table, read_values, was_measured, write_table, write_values
from droppeft.cached_layers import FrozenLayers, StateStore
from droppeft.cached_layers.cached_layers import CachedLayers
from droppeft.client.client_model import ClientModel
from droppeft.config import Config
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenTable
from droppeft.federated_method import local_training
from droppeft.layer_dropout import sample_active
from droppeft.layer_dropout.modes import skipping
from droppeft.messages.instruction import AdapterSpec, LayerAdapter, StateCache
from droppeft.messages.reply import CachedLayersCost
from droppeft.models.loading import load_backbone
from droppeft.tasks.registry import task_named
from droppeft.training.loop import Step, train

NAME = "frozen_layers"
CACHE = StateCache("fp16", 1 << 30)
SHARES = (0, 1 / 4, 1 / 2, 3 / 4)
VISITS = ("no cache", "first visit", "later visit")


@dataclass(frozen=True)
class Subject:
    """A model, and the batch that it is measured with."""

    name: str
    batch: int
    length: int

    def path(self, data: Path) -> str:
        return self.name if self.name.startswith("config:") else str(data / self.name)


SUBJECTS = {
    "bert-large": Subject("config:bert-large", batch=4, length=64),
    "deep12": Subject("deep12", batch=16, length=64),
}


@dataclass(frozen=True)
class Arm:
    """One way to take a step."""

    frozen: int
    visit: str
    dropped: int

    @property
    def name(self) -> str:
        return f"{self.frozen} frozen, {self.visit}, {self.dropped} dropped"


def arms(depth: int) -> Iterator[Arm]:
    """All arms; the others are compared with the first."""
    for share in SHARES:
        frozen = round(share * depth)
        for visit in VISITS if frozen else VISITS[:1]:
            for dropped in (0, (depth - frozen) // 2):
                yield Arm(frozen, visit, dropped)


class Stand:
    """A model and random rows of one length."""

    def __init__(self, subject: Subject, data: Path) -> None:
        backbone = load_backbone(subject.path(data), ("a", "b"), seed=0)
        self.model = ClientModel(backbone, task_named("classification"), "cpu", seed=0)
        self.depth = backbone.num_layers
        rng = np.random.default_rng(0)
        rows, tokens = subject.batch, subject.batch * subject.length
        ids = rng.integers(1000, 20000, tokens).astype(np.int32)
        columns = {
            name: ids if name == "input_ids" else np.zeros_like(ids) for name in backbone.inputs
        }
        offsets = np.arange(rows + 1, dtype=np.int64) * subject.length
        self.table = TokenTable(columns, offsets, rng.integers(0, 2, rows))
        self.rows: Rows = np.arange(rows)

    def step(self, arm: Arm, folder: Path, draw: random.Random) -> dict[str, float]:
        """One training step of an arm; on a later visit the states are on the disk already."""
        lora = LayerAdapter("lora", rank=8)
        behind = self.depth - arm.frozen
        self.model.attach(AdapterSpec((None,) * arm.frozen + (lora,) * behind, alpha=16.0))
        if arm.visit == "later visit":
            self._train(arm, self._cached(arm, folder, round=1), draw)
        cached = self._cached(arm, folder, round=2)
        measured = self._train(arm, cached, draw)
        cost = cached.cost if cached else CachedLayersCost()
        expected = {"no cache": (0, 1), "first visit": (0, 1), "later visit": (1, 0)}
        hits, built = (share * len(self.rows) for share in expected[arm.visit])
        if cached and (cost.hits, cost.built) != (hits, built):
            raise RuntimeError(f"{arm.name}: {cost}")
        on_disk = cost.stored_bytes / len(self.rows)
        return {**measured, "build_s": cost.build_wall_s, "disk_bytes_per_example": on_disk}

    def _cached(self, arm: Arm, folder: Path, round: int) -> CachedLayers | None:
        if not arm.frozen:
            return None
        stores = arm.visit != "no cache"
        store = StateStore(folder, f"{arm.frozen}", round, CACHE) if stores else None
        frozen = FrozenLayers(self.model.model, self.model.blocks, arm.frozen)
        task = self.model.task
        return CachedLayers(frozen, store, self.table, task, [self.rows], nullcontext)

    def _train(
        self, arm: Arm, cached: CachedLayers | None, draw: random.Random
    ) -> dict[str, float]:
        behind = self.depth - arm.frozen
        rates = (0.0,) * arm.frozen + (arm.dropped / behind,) * behind
        active = sample_active(rates, "exact", draw)
        step = Step([self.model.task.collate(self.table, self.rows)], skipping(active), 1.0)
        trainable = self.model.trainable(self.model.parameters)
        outcome = train(trainable, [step], local_training(Config()), cached=cached)
        if cached:
            cached.close()
        ran = sum(outcome.active_steps)
        if ran != behind - arm.dropped:
            raise RuntimeError(f"{arm.name}: {ran} layers ran")
        return {"step_s": outcome.wall_s, "stored_bytes": outcome.activation_bytes_peak}


def measure(subject: Subject, data: Path, repeats: int) -> dict[str, Any]:
    """All arms of a model, in another order in every repeat: its depth, and rows of both tables."""
    name = subject.name.removeprefix("config:")
    stand = Stand(subject, data)
    chosen = list(arms(stand.depth))
    raw: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in chosen}
    draw = random.Random(0)
    for repeat in range(-1, repeats):  # the first one warms up
        for arm in draw.sample(chosen, len(chosen)):
            with tempfile.TemporaryDirectory() as folder:
                measured = stand.step(arm, Path(folder), draw)
            if repeat >= 0:
                raw[arm.name].append(measured)
        print(f"{subject.name}: repeat {repeat + 1} of {repeats}", flush=True)
    base = raw[chosen[0].name]
    places = [
        {"model": name, "frozen": arm.frozen, "visit": arm.visit, "dropped": arm.dropped}
        for arm in chosen
    ]
    result = [
        {
            **place,
            "limit": (stand.depth - arm.frozen - arm.dropped) / stand.depth,
            **_compared(raw[arm.name], base),
        }
        for place, arm in zip(places, chosen, strict=True)
    ]
    rows = [
        {**place, "repeat": repeat, **one}
        for place, arm in zip(places, chosen, strict=True)
        for repeat, one in enumerate(raw[arm.name])
    ]
    return {"layers": stand.depth, "result": result, "repeats": rows}


def _compared(ours: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, float]:
    ratios = [one["step_s"] / other["step_s"] for one, other in zip(ours, base, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    stored = median(one["stored_bytes"] for one in ours)
    return {
        "step_s": median(one["step_s"] for one in ours),
        "time_ratio": median(ratios),
        "time_ratio_low": low,
        "time_ratio_high": high,
        "stored_bytes": stored,
        "stored_ratio": stored / median(one["stored_bytes"] for one in base),
        "build_s": median(one["build_s"] for one in ours),
        "disk_bytes_per_example": ours[0]["disk_bytes_per_example"],
    }


def write(subject: Subject, repeats: int, found: dict[str, Any], data: Path) -> None:
    """Put a model's result beside those of the others."""
    name = subject.name.removeprefix("config:")
    known = was_measured(NAME)
    models = read_values(NAME)["models"] if known else {}
    models[name] = {
        "layers": found["layers"],
        "batch_size": subject.batch,
        "length": subject.length,
        "repeats": repeats,
    }
    for table in ("result", "repeats"):
        others = [row for row in read_table(NAME, table) if row["model"] != name] if known else []
        write_table(NAME, table, [*others, *found[table]])
    write_values(NAME, {**about(NAME, data=data), "models": models})


def main() -> None:
    """Measure the models asked for, and write each as it finishes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with deep12")
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        found = measure(SUBJECTS[name], arguments.data, arguments.repeats)
        write(SUBJECTS[name], arguments.repeats, found, arguments.data)


if __name__ == "__main__":
    main()
