"""How close the gradients of cheaper training steps are to those of full depth, and what they cost.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m benchmarks.gradient_fidelity.run
    ... --model smollm2      # one of mpnet (AG News) and smollm2 (E2E)
    ... --smoke              # a few batches; prints the result and writes nothing

LoRA of rank 8 on the queries and values of all layers, frozen weights in bf16, no dropout modules.
Gradients of 16 batches (SmolLM2: 10) at full depth stand for the expected gradient. Each candidate
(see `candidates.py`) computes gradients of the first half of them, with 2 draws of its layers in
each; where a draw only leaves out gradients of the lower layers, they are taken from those of full
depth, for every possible draw. This is done with the initial values, where B is 0 and A therefore
has no gradient, and again after 100 steps of AdamW at full depth on other texts.

Before each, the loss that is added by skipping a layer, and the mean of what a layer adds to its
input, are measured on further batches, for the candidates that need them. FLOPs are counted from
shapes, for batches of the mean length.

Writes the tables `result` (what the pages show), `draws` (a row per batch and draw) and
`calibration` (a row per layer), and `study.json`; `make results` draws them. About 25 minutes on
one core. A model that is in `study.json` is not measured again. It needs `$DROPPEFT_DATA` and the
packages of `model=mpnet` and `model=smollm2`.
"""

import argparse
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from benchmarks.gradient_fidelity.candidates import Candidate, candidates
from benchmarks.gradient_fidelity.estimates import Row, compared, cosine, summary
from benchmarks.gradient_fidelity.layers import Layers, Modes, relative_cost
from benchmarks.gradient_fidelity.stand import SETTINGS, SUBJECTS, Gradient, Sizes, Stand
from benchmarks.study import about, read_table, read_values, was_measured, write_table, write_values

NAME = "gradient_fidelity"
TABLES = ("result", "draws", "calibration")
SMOKE = Sizes(full=3, batches=2, draws=1, calibration=1, steps=2)
SAID = ("cost", "cosine", "second_moment", "best", "best_error", "plain", "signs")

Tables = dict[str, list[dict[str, Any]]]


class Measuring:
    """Measures candidates with the values that a model has now."""

    def __init__(self, stand: Stand, layers: Layers, sizes: Sizes) -> None:
        self.stand, self.layers, self.sizes = stand, layers, sizes
        self.full = [stand.gradient(batch) for batch in stand.batches]
        self.adapters = torch.stack([gradient.adapters for _, gradient in self.full])
        self.head = torch.stack([gradient.head for _, gradient in self.full])

    def measure(self, candidate: Candidate) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Rows of a candidate, one for each batch and draw, and its mean gradients by batch."""
        rng, rows, means = random.Random(candidate.name), [], []
        for batch in range(self.sizes.batches):
            gradients = []
            for draw, modes in enumerate(candidate.draws(rng, self.sizes.draws)):
                loss, gradient = self._gradient(candidate, batch, modes)
                gradients.append(gradient.adapters)
                cost = relative_cost(self.stand.counts, modes)
                place = {"batch": batch, "draw": draw, "cost": cost, "loss": loss}
                rows.append({**place, **self._compared(gradient, batch)})
            means.append(torch.stack(gradients).mean(0))
        return rows, torch.stack(means)

    def _gradient(self, candidate: Candidate, batch: int, modes: Modes) -> tuple[float, Gradient]:
        if candidate.is_exact:
            loss, full = self.full[batch]
            return loss, replace(full, adapters=full.adapters * self.stand.trained(modes))
        self.layers.modes = modes
        return self.stand.gradient(self.stand.batches[batch])

    def _compared(self, gradient: Gradient, batch: int) -> dict[str, float | None]:
        adapters = compared(gradient.adapters, batch, self.adapters)
        if not self.head.numel():
            return {**adapters, "head_cosine": None, "both_cosine": None}
        head = compared(gradient.head, batch, self.head)
        both = {name: adapters[name] + head[name] for name in adapters}
        return {**adapters, "head_cosine": cosine(head), "both_cosine": cosine(both)}


def measure_candidates(stand: Stand, sizes: Sizes, place: Row) -> Tables:
    """Rows of all tables with the values that the model has now; `place` is put before each."""
    tables: Tables = {name: [] for name in TABLES}
    with stand.computing() as layers:
        added, layers.means = stand.calibrate(layers)
        tables["calibration"] = [
            {**place, "layer": layer, "added_loss": loss} for layer, loss in enumerate(added)
        ]
        measuring = Measuring(stand, layers, sizes)
        full_rows: list[dict[str, Any]] = []
        for candidate in candidates(added):
            start, named = time.perf_counter(), {**place, "candidate": candidate.name}
            rows, means = measuring.measure(candidate)
            full_rows = full_rows or rows
            all_choices = candidate.draw is None
            found = summary(rows, full_rows, means, measuring.adapters, all_choices=all_choices)
            others = {of: _mean(rows, of) for of in ("head_cosine", "both_cosine", "loss")}
            tables["result"].append({**named, **found, **others})
            tables["draws"] += [{**named, **row} for row in rows]
            said = ", ".join(f"{name} {found[name]:.3f}" for name in SAID)
            print(f"{named}: {said}, {time.perf_counter() - start:.0f} s", flush=True)
    return tables


def _mean(rows: Sequence[Row], of: str) -> float | None:
    values = [row[of] for row in rows if row[of] is not None]
    return fmean(values) if values else None


def measure(name: str, sizes: Sizes) -> tuple[dict[str, Any], Tables]:
    """What is known of a model, and its rows of all tables."""
    start, subject = time.perf_counter(), SUBJECTS[name]
    stand = Stand(subject, sizes)
    stand.set_initial_values()
    before = measure_candidates(stand, sizes, {"model": name, "after_steps": 0})
    loss = stand.train()
    after = measure_candidates(stand, sizes, {"model": name, "after_steps": sizes.steps})
    known = {
        "settings": [*SETTINGS, *subject.words],
        "data": subject.data,
        "layers": len(stand.model.blocks),
        "batch_size": subject.batch_size,
        "length": stand.length,
        "train_loss": loss,
        **vars(sizes),
        "wall_s": time.perf_counter() - start,
    }
    return known, {table: before[table] + after[table] for table in TABLES}


def write(name: str, known: Row, tables: Tables) -> None:
    """Put a model's results beside those of the others."""
    others = read_values(NAME)["models"] if was_measured(NAME) else {}
    for table in TABLES:
        kept = [row for row in read_table(NAME, table) if row["model"] != name] if others else []
        write_table(NAME, table, [*kept, *tables[table]])
    write_values(NAME, {**about(NAME), "models": {**others, name: known}})


def main() -> None:
    """Measure the models that have no results yet, and write each as it finishes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SUBJECTS), help="only this one")
    parser.add_argument("--smoke", action="store_true", help="measure little and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = read_values(NAME)["models"] if was_measured(NAME) else {}
    for name in [options.model] if options.model else SUBJECTS:
        if options.smoke:
            measure(name, SMOKE)
        elif name in done:
            print(f"{name} has results already", flush=True)
        else:
            write(name, *measure(name, SUBJECTS[name].sizes))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
