"""What makes LoRA learn in fewer steps: rates of A and B, the start, the rank, and the targets.

    python -m benchmarks.recipe.run [--models smollm2,mpnet] [--seeds 0] [--cells 0 3]

One client with all rows, so that nothing but the recipe matters: SmolLM2 and E2E or dolly
(completion loss), and MPNet and AG News or 20 Newsgroups (accuracy). It trains in rounds of ten
steps, as a client of a federation does, with a new optimizer in each round. LoRA has rank 8 in the
attention of all layers and alpha 16 unless the cell says otherwise. The learning rates fall to 0
over the run.

The starts are peft's: `gaussian` and `orthogonal` draw A and B; EVA takes A from the inputs of the
adapted layers on 16 batches; PiSSA and OLoRA take A and B from the weights, and subtract their
product from these. All but the last two leave the frozen weights as they are.

Appends a row for each evaluation to the table `rounds`, and skips cells that it has. A cell takes
about two minutes on one core, all cells about an hour.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer

from benchmarks.speed.measuring import data_file
from benchmarks.study import FOLDER, about, append_rows, read_table, write_values
from droppeft.adapters.by_layer import get_tensors, set_tensors
from droppeft.client.client import Client
from droppeft.client.client_model import ClientModel
from droppeft.client.run_inputs import clients_of
from droppeft.config import load_config
from droppeft.messages.reply import Update
from droppeft.messages.server_state import ServerState
from droppeft.models.hardware import resolve_here
from droppeft.server.prepare import Prepared, prepare
from droppeft.tasks.task import model_inputs
from droppeft.training.loop import evaluate

NAME, ROUNDS, STEPS = "recipe", 6, 10
COMMON = (
    *("method=fedlora", "clients=1", "cohort_size=1", "partition.kind=iid", f"rounds={ROUNDS}"),
    *(f"training.local_steps={STEPS}", "threads=1", "accelerator=cpu", "training.precision=bf16"),
    *("evaluation.personalised=false", "evaluation.generated=0", "evaluation.validation_clients=0"),
)
MODELS = {
    "smollm2": (
        *("task=causal_lm", "model=smollm2", "data=e2e_nlg", "source.train=validation"),
        *("source.test=test", "source.max_train_rows=480", "source.max_test_rows=64"),
        *("evaluation.rows=64", "training.batch_size=6", "training.max_length=128"),
    ),
    "smollm2 on dolly": (
        *("task=causal_lm", "model=smollm2", "data=dolly15k", "source.max_train_rows=480"),
        *(
            "source.max_test_rows=64",
            "evaluation.rows=64",
            "training.batch_size=6",
            "training.max_length=128",
        ),
    ),
    "mpnet": (
        *("model=mpnet", "data=ag_news", "source.max_train_rows=1200", "evaluation.rows=300"),
        *("source.max_test_rows=300", "training.batch_size=16", "training.max_length=64"),
    ),
    "mpnet on news20": (
        *("model=mpnet", "data=news20", "source.max_train_rows=1200", "evaluation.rows=300"),
        *("source.max_test_rows=300", "training.batch_size=16", "training.max_length=64"),
    ),
}
EVA_BATCHES = 16
OF_WEIGHTS = ("pissa_niter_16", "olora")
"""Starts that change the frozen weights."""


class Cell(NamedTuple):
    """One recipe."""

    rate: float = 1e-3
    ratio: float = 1.0
    start: str = "default"
    rank: int = 8
    targets: str = "default"

    def words(self) -> list[str]:
        """The settings of the recipe."""
        return [
            f"training.learning_rate={self.rate}",
            f"training.loraplus_lr_ratio={self.ratio}",
            *(f"adapter.rank={self.rank}", f"adapter.alpha={2 * self.rank}"),
            f"adapter.targets={self.targets}",
        ]


RATES = ((1e-3, 1.0), (3e-3, 1.0), (1e-3, 4.0), (1e-3, 16.0), (3e-3, 4.0), (3e-4, 16.0))
CELLS = (
    *(Cell(rate, ratio) for rate, ratio in RATES),
    *(Cell(1e-3, 4.0, start) for start in ("gaussian", "orthogonal", "eva", *OF_WEIGHTS)),
    *(Cell(1e-3, 4.0, rank=rank) for rank in (4, 16, 32)),
    Cell(1e-3, 4.0, targets="all-linear"),
)


def started(prepared: Prepared, client: Client, start: str) -> ServerState:
    """The state before round 1, with the initial values of a start of peft."""
    state, model = prepared.state, client.model
    model.attach(state.model.adapter)
    set_tensors(model.parameters, state.model.tensors)
    if start == "default":
        return state
    torch.manual_seed(prepared.config.seed)
    if start == "eva":
        _eva(client, prepared.config.training.batch_size)
    for layer in model.model.modules() if start != "eva" else ():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            _reset(layer, start)
    return replace(state, model=replace(state.model, tensors=get_tensors(model.parameters)))


def _reset(layer: Any, start: str) -> None:
    """Give a LoRA its start; PiSSA and OLoRA also change the weights below it."""
    with torch.no_grad():
        if start.startswith("pissa"):
            layer.pissa_init("default", start)
        elif start == "olora":
            layer.olora_init("default")
        elif start == "orthogonal":
            layer.orthogonal_init("default")
        else:
            layer.reset_lora_parameters("default", start)


def _eva(client: Client, batch_size: int) -> None:
    """Take each A from the inputs of its layer on some batches."""
    model: Any = client.model.model
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    chosen = client.rows.train[: EVA_BATCHES * batch_size]
    batches = [
        model_inputs(client.model.task.collate(client.table, chosen[first : first + batch_size]))
        for first in range(0, len(chosen), batch_size)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def train(name: str, cell: Cell, seed: int) -> Iterator[dict[str, Any]]:
    """Train a cell, and yield a row after each second round."""
    words = [data_word(word) for word in MODELS[name]]
    config = resolve_here(load_config(None, [*COMMON, *words, *cell.words(), f"seed={seed}"]))
    prepared = prepare(config, lambda what: None, f"{time.time_ns():x}")
    [client] = clients_of(prepared.loaded)
    assert isinstance(client, Client)
    state = started(prepared, client, cell.start)
    columns = {"model": name, "seed": seed, **cell._asdict()}
    yield {**columns, "steps": 0, **_quality(prepared, client.model, state), "train_loss": None}
    for round in range(1, ROUNDS + 1):
        instructions = prepared.method.instruct(prepared.setup, state, round, [0])
        replies = [client.run(instruction) for instruction in instructions]
        assert isinstance(replies[0], Update)
        state = prepared.method.merge(prepared.setup, state, instructions, replies)
        if round % 2 == 0:
            found = _quality(prepared, client.model, state)
            yield {**columns, "steps": round * STEPS, **found, "train_loss": replies[0].train_loss}


def _quality(prepared: Prepared, model: ClientModel, state: ServerState) -> dict[str, float]:
    model.attach(state.model.adapter)
    set_tensors(model.parameters, state.model.tensors)
    found = evaluate(model.model, prepared.test, prepared.sample, model.task, 16, "bf16")
    return {"loss": found.loss, "accuracy": found.metrics.get("accuracy", float("nan"))}


def data_word(word: str) -> str:
    """The setting `data` with the folder of the data."""
    return f"data={data_file(word.removeprefix('data='))}" if word.startswith("data=") else word


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="smollm2,mpnet")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--cells", type=int, nargs="*", default=range(len(CELLS)))
    chosen = parser.parse_args()
    write_values(NAME, {**about(NAME), "rounds": ROUNDS, "steps": STEPS, "settings": settings()})
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    for name, seed, number in itertools.product(chosen.models.split(","), seeds, chosen.cells):
        cell = CELLS[number]
        if (name, seed, *cell) in done():
            continue
        start = time.perf_counter()
        rows = list(train(name, cell, seed))
        append_rows(NAME, "rounds", rows)
        losses = " ".join(f"{row['loss']:.3f}" for row in rows)
        print(f"{name} {cell}: {losses} ({time.perf_counter() - start:.0f} s)", flush=True)


def settings() -> dict[str, Sequence[str]]:
    """The settings of each model's runs."""
    return {name: [*COMMON, *words] for name, words in MODELS.items()}


def done() -> set[tuple[Any, ...]]:
    """Model, seed and recipe of the cells that are in the table."""
    if not Path(FOLDER / NAME / "rounds.csv.gz").exists():
        return set()
    keys = ("model", "seed", *Cell._fields)
    return {tuple(row[key] for key in keys) for row in read_table(NAME, "rounds")}


if __name__ == "__main__":
    main()
