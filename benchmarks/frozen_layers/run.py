"""What frozen first layers save: step time and stored bytes against their number.

    python -m benchmarks.frozen_layers.run $DROPPEFT_DATA                   # about 15 minutes
    python -m benchmarks.frozen_layers.run $DROPPEFT_DATA --models deep12 --repeats 3

For BERT-large (random weights) and `deep12`, with the first m layers frozen, in random order: LoRA
in the last L - m layers without a cache, with the first use of a row (its hidden states are
computed alone and stored), and with a later use (they are on the disk), each at full depth and
with half of the layers behind the frozen ones dropped in every step. Beside it the limit: the
share of the layers that still run. All measured, on one thread; ratios to LoRA in all layers of
the same repeat. Writes the tables `result` and `repeats`, `study.json` and
`docs/figures/frozen_layers.png`.
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

import matplotlib as mpl
import matplotlib.pyplot as plt
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
from droppeft.messages import AdapterSpec, CachedLayersCost, LayerAdapter, StateCache
from droppeft.models.loading import load_backbone
from droppeft.training.loop import Step, train

NAME = "frozen_layers"
CACHE = StateCache("fp16", 1 << 30)
FIGURE = Path(__file__).resolve().parents[2] / "docs/figures/frozen_layers"
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
        self.model = ClientModel(backbone, "cpu", seed=0)
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
        step = Step(self.model.task.collate(self.table, self.rows), active, 1.0)
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


def draw() -> None:
    """Step time and stored bytes against the share of frozen layers, with the limit."""
    mpl.rcParams["svg.hashsalt"] = "droppeft"
    models, result = read_values(NAME)["models"], read_table(NAME)
    names = list(models)
    figure, axes = plt.subplots(
        2, len(names), figsize=(5 * len(names), 7), sharex=True, sharey="row", layout="constrained"
    )
    styles = {
        "no cache": ("#4c566a", "o", "LoRA in the last layers, no cache"),
        "first visit": ("#2e7d8c", "s", "first visit, states kept"),
        "later visit": ("#d1495b", "^", "later visit"),
    }
    for column, name in zip(np.atleast_2d(axes.T), names, strict=True):
        model = models[name]
        rows = [row for row in result if row["model"] == name]
        depth = model["layers"]
        for axis, key in zip(column, ("time_ratio", "stored_ratio"), strict=True):
            axis.plot([0, 1], [1, 0], color="black", linestyle=":", linewidth=1)
            axis.text(0.62, 0.41, "limit", rotation=-38, fontsize=8)
            for visit, (color, marker, label) in styles.items():
                for halved, line in ((False, "-"), (True, "--")):
                    arms_ = [
                        arm
                        for arm in rows
                        if bool(arm["dropped"]) == halved
                        and arm["visit"] in (visit, VISITS[0] if arm["frozen"] == 0 else visit)
                    ]
                    axis.plot(
                        [arm["frozen"] / depth for arm in arms_],
                        [arm[key] for arm in arms_],
                        color=color,
                        marker=marker,
                        markersize=5,
                        linestyle=line,
                        label=label + (", half of the rest dropped" if halved else ""),
                    )
            axis.grid(alpha=0.3)
            axis.set_ylim(0, 1.08)
        column[0].set_title(
            f"{name}, {model['batch_size']} x {model['length']} tokens", fontsize=10
        )
        column[1].set_xlabel("share of layers that are frozen")
    axes.T.flat[0].set_ylabel("step time, LoRA in all layers = 1")
    axes.T.flat[1].set_ylabel("stored bytes, LoRA in all layers = 1")
    handles, labels = axes.T.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=8)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE.with_suffix(".png"), dpi=130)
    figure.savefig(FIGURE.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Measure and draw, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with deep12")
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--draw", action="store_true", help="only draw the committed result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.draw:
        for name in arguments.models:
            found = measure(SUBJECTS[name], arguments.data, arguments.repeats)
            write(SUBJECTS[name], arguments.repeats, found, arguments.data)
    draw()


if __name__ == "__main__":
    main()
