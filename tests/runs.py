"""A whole run that takes about a second: its data, its settings, and comparisons of runs."""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from droppeft.client.client import Client
from droppeft.client.client_state import client_folder
from droppeft.client.published_task import PublishedTask, published
from droppeft.client.run_inputs import Loaded, clients_of
from droppeft.config import load_config, resolve
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import GlobalModel
from droppeft.methods import METHODS
from droppeft.runs.checkpoints import Checkpoint, load_newest, load_round
from droppeft.runs.export import saved_model
from droppeft.runs.ledger import RoundRow
from droppeft.server.prepare import Prepared, prepare
from droppeft.server.run import start_run
from droppeft.transports.base import Arrival, Transport
from droppeft.transports.in_process import InProcess

TOPICS = {
    "food": ("bread", "apple", "cheese", "soup", "salt", "rice"),
    "space": ("planet", "star", "moon", "rocket", "orbit", "comet"),
    "music": ("violin", "song", "drum", "piano", "chord", "opera"),
}
SETTINGS = (
    "method=droppeft",
    "clients=4",
    "cohort_size=2",
    "rounds=3",
    "training.local_steps=2",
    "training.batch_size=4",
    "training.precision=fp32",  # the same on machines with and without bf16
    "partition.min_rows=6",
    "threads=1",
    "workers=1",
    "accelerator=cpu",
    "evaluation.rows=20",
    "dropout.mean=0.25",
)


def prepared_run(*overrides: str) -> Prepared:
    """A run that is ready for round 1."""
    config = resolve(load_config(None, overrides), cuda=False)
    return prepare(config, lambda step: None, "00c0ffee")


def published_for(prepared: Prepared) -> PublishedTask:
    """What the server of a prepared run publishes about its task."""
    loaded = prepared.loaded
    return published(loaded.config.task, loaded.data.label_names, loaded.backbone)


def write_tiny_data(folder: Path) -> Path:
    """Write train.csv (180 rows) and test.csv (60) of three classes whose words differ."""
    draw = random.Random(0)
    for split, rows in (("train", 180), ("test", 60)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for row in range(rows):
                label = sorted(TOPICS)[row % len(TOPICS)]
                writer.writerow((" ".join(draw.choices(TOPICS[label], k=6)), label))
    return folder


def adapter_bytes(out: Path) -> dict[str, bytes]:
    """Content of every file of the exported adapter."""
    return {path.name: path.read_bytes() for path in sorted((out / "adapter").iterdir())}


def timeless(value: Any) -> Any:
    """Remove measured times and the run's name, which differ between equal runs."""
    if isinstance(value, dict):
        return {
            key: timeless(item)
            for key, item in value.items()
            if not key.endswith(("_wall_s", "_measured_s", "_host_s")) and key != "run"
        }
    return [timeless(item) for item in value] if isinstance(value, list) else value


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file; every line must be complete."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoint_of(run: Path, round: int | None = None) -> Checkpoint:
    """The newest checkpoint of a run's folder, or that of a round."""
    kind = METHODS[load_config(run / "config.toml").method].memory_type
    folder = run / "checkpoints"
    return load_newest(folder, kind) if round is None else load_round(folder, round, kind)


def delivered_model(run: Path) -> GlobalModel:
    """The global model that a finished run delivers."""
    return saved_model(run, None, None)[1].state.model


def outcome(out: Path) -> dict[str, Any]:
    """All that must be equal in two runs of the same configuration, interrupted or not."""
    return {
        "adapter": adapter_bytes(out),
        "config": (out / "config.toml").read_bytes(),
        "rounds": timeless(rows_of(out / "rounds.jsonl")),
        "clients": timeless(rows_of(out / "clients.jsonl")),
        "result": timeless(json.loads((out / "result.json").read_text())),
    }


Clients = Sequence[Client]
"""All clients of a run, by number."""


def update_of(clients: Clients, instruction: Instruction) -> Update:
    """The update of a client that runs an instruction; fails if there is none."""
    reply = clients[instruction.client].run(instruction)
    assert isinstance(reply, Update)
    return reply


def stop_after_a_round(overrides: list[str], out: Path) -> None:
    """Start a run that fails after its first round has been saved."""

    class Stops(Recorder):
        def round_done(self, row: RoundRow) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        start_run(load_config(None, overrides), out, Stops())


class Recorder:
    """A listener that records what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.earlier: list[RoundRow] = []
        self.replies: list[Reply] = []
        self.rows: list[RoundRow] = []
        self.results: list[Any] = []

    def preparing(self, what: str) -> None:
        self.steps.append(what)

    def started(self, about: Any, rows: list[RoundRow]) -> None:
        self.earlier = rows

    def replied(self, reply: Reply) -> None:
        self.replies.append(reply)

    def round_done(self, row: RoundRow) -> None:
        self.rows.append(row)

    def finished(self, result: Any) -> None:
        self.results.append(result)


def interfering(
    when: Callable[[Instruction], bool], what: Callable[[Path], object]
) -> Callable[[Loaded], AbstractContextManager[Transport]]:
    """A transport in this process that changes a client's state files before some instructions."""

    class Interferes:
        def __init__(self, inner: InProcess) -> None:
            self.inner = inner

        def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
            for instruction in instructions:
                if instruction.state_round is not None and when(instruction):
                    for path in client_folder(instruction.run, instruction.client).iterdir():
                        what(path)
            yield from self.inner.exchange(instructions)

    return lambda loaded: nullcontext(Interferes(InProcess(clients_of(loaded))))
