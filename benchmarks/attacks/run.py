"""What malicious clients do to a run, by attack, number of attackers and merge rule.

    python -m benchmarks.attacks.run FOLDER_OF_DATA

Twenty clients learn the topics of texts of AG News, an epoch in each of 15 rounds. So that some
hundred runs fit into minutes, the built-in model is frozen as a whole and embeds each text once;
what is trained are LoRA matrices in two dense layers above it, and a head. The server is that of
droppeft: method `fedlora`, its checks, bounds, merge rules and rounds. Attackers are the same
clients in every round. They do what they are asked to do, except that they

- send the negative of their change, 1, 1.9, 10 or 100 times as large ("sign flip");
- send noise of 10 times the norm of their change, in each tensor ("noise x 10");
- train on labels in reversed order ("label flip");
- send the negative of their change and claim 10^9 rows ("sign flip, 10^9 rows"); or
- are honest for five rounds before they send 1.9 times the negative of their change ("late").

A cell is one run. Its row in the table `cells` has the accuracy of the last model on the test
texts, and how often updates were clipped, limited or left out. Cells that have a row are not run
again.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from benchmarks.study import FOLDER, about, append_rows, read_table, write_values
from droppeft import seeds
from droppeft.config import Config, ServerConfig, SourceConfig, load_config
from droppeft.data.partition import partition_rows
from droppeft.data.sources import load_text
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.reply import MeasuredCost, Update
from droppeft.messages.tensors import HEAD, Array, LayerKey, Layout, Tensors, flatten
from droppeft.methods import METHODS, Setup
from droppeft.models.packaged import builtin_model_folder
from droppeft.server import rounds
from droppeft.server.rounds import run_round
from droppeft.sharing import bounding, direction_check
from droppeft.sharing.direction_check import FEWEST_DIRECTIONS as FEWEST
from droppeft.sharing.direction_check import Directions, compare_directions
from droppeft.transports.base import Arrival

NAME = "attacks"
CLIENTS, CLASSES, WIDTH, LAYERS, RANK, SCALE, IGNORED = 20, 4, 128, 2, 8, 2.0, -100
LENGTH, TRAIN_ROWS, TEST_ROWS, CLAIMED = 24, 3000, 2000, 10**9
KEY = ("seed", "partition", "attack", "share", "rule")
"""Columns that say which cell a row is of."""

SETTINGS = [
    *("method=fedlora", f"clients={CLIENTS}", f"cohort_size={CLIENTS}", "rounds=15"),
    *("training.local_epochs=1", "threads=1", f"adapter.rank={RANK}"),
    *("training.precision=fp32", "training.backbone_dropout=true"),  # the defaults when it ran
]
BOUNDS: Mapping[str, Any] = {"direction_check": False}
ROBUST = {**BOUNDS, "malicious_fraction": 0.3}
WHOLE, EACH_ROUND, OF_TEN = "whole update", "each round alone", "check of ten"
RULES: Mapping[str, Mapping[str, Any]] = {
    "mean, no bounds": {**BOUNDS, "clip_norm_multiple": 0.0, "max_weight_multiple": 0.0},
    "bounds": BOUNDS,
    "default": {},
    "median": {**BOUNDS, "merge": "median"},
    "trimmed mean": {**ROBUST, "merge": "trimmed_mean"},
    "Krum": {**ROBUST, "merge": "krum"},
    "multi-Krum": {**ROBUST, "merge": "multi_krum"},
    "multiple 1": {**BOUNDS, "clip_norm_multiple": 1.0},
    "multiple 1.5": {**BOUNDS, "clip_norm_multiple": 1.5},
    WHOLE: BOUNDS,
    EACH_ROUND: {},
    OF_TEN: {},
}
"""Settings of the table `server`; the last ones are to choose the default.

`check of ten` compares the directions of ten updates, too, and `each round alone` has no memory."""

MAIN = tuple(RULES)[:7]
NORMS, COMPARE = bounding._norms, compare_directions

DIRICHLET, IID, UNLIKE, TEN = "dirichlet", "iid", "dirichlet 0.1", "ten clients, dirichlet 0.1"
PARTITIONS: Mapping[str, Sequence[str]] = {
    DIRICHLET: (),
    IID: ("partition.kind=iid",),
    UNLIKE: ("partition.alpha=0.1",),
    TEN: ("clients=10", "cohort_size=10", "partition.alpha=0.1"),
}
"""Further settings by how the texts are distributed over the clients."""

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Tamper = Callable[[Array, Array, np.random.Generator], Array]
"""Returns what an attacker sends for a tensor, from what it got and what it trained."""


def flipped(factor: float) -> Tamper:
    """The negative of the change, scaled."""
    return lambda got, trained, rng: got - factor * (trained - got)


def noise(got: Array, trained: Array, rng: np.random.Generator) -> Array:
    """Gaussian noise of ten times the norm of the change."""
    drawn = rng.standard_normal(trained.shape)
    return got + 10 * np.linalg.norm(trained - got) / np.linalg.norm(drawn) * drawn


@dataclass(frozen=True)
class Attack:
    """What an attacker does.

    Attributes:
        tamper: changes the values that it sends, if it does.
        flips_labels: whether it trains on labels in reversed order.
        claims: the number of rows that it claims, if not its own.
        since: the first round in which it attacks.
    """

    tamper: Tamper | None = None
    flips_labels: bool = False
    claims: int | None = None
    since: int = 1


NO_ATTACK = "none"
ATTACKS = {
    NO_ATTACK: Attack(),
    "sign flip": Attack(flipped(1)),
    "sign flip x 1.9": Attack(flipped(1.9)),
    "sign flip x 10": Attack(flipped(10)),
    "sign flip x 100": Attack(flipped(100)),
    "noise x 10": Attack(noise),
    "label flip": Attack(flips_labels=True),
    "sign flip, 10^9 rows": Attack(flipped(1), claims=CLAIMED),
    "sign flip x 1.9, late": Attack(flipped(1.9), since=6),
}


@dataclass(frozen=True)
class Data:
    """Embedded texts (rows, width) and their classes (rows,)."""

    texts: Floats
    labels: Labels


def embedded(folder: Path, part: str) -> Data:
    """Embed the texts of a split: the mean of the last hidden states."""
    source = SourceConfig(max_train_rows=TRAIN_ROWS, max_test_rows=TEST_ROWS)
    table: Any = getattr(load_text(str(folder / "ag_news"), source), part)
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    model = AutoModel.from_pretrained(builtin_model_folder()).eval()
    found = []
    texts = list(table.texts)
    for start in range(0, len(texts), 100):
        batch = tokenizer(
            texts[start : start + 100],
            truncation=True,
            max_length=LENGTH,
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append(((states * mask).sum(1) / mask.sum(1)).numpy())
    return Data(np.concatenate(found), np.asarray(table.labels, np.int64))


def projected(train: Data, test: Data) -> tuple[Data, Data]:
    """Both in the main components of the training texts, with unit variance on average."""
    mean = train.texts.mean(axis=0)
    _, sizes, components = np.linalg.svd(train.texts - mean, full_matrices=False)
    scale = np.sqrt(np.square(sizes[:WIDTH]).mean() / len(train.labels))

    def project(data: Data) -> Data:
        texts = (data.texts - mean) @ components[:WIDTH].T / scale
        return replace(data, texts=texts.astype(np.float32))

    return project(train), project(test)


@cache
def frozen_weights() -> list[torch.Tensor]:
    """The weights of the dense layers, which are random and never change."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5 for _ in range(LAYERS)]


def names(layer: int) -> tuple[str, str]:
    """The names of A and B of a layer."""
    return f"dense.{layer}.lora_A.weight", f"dense.{layer}.lora_B.weight"


def fresh(spec: AdapterSpec) -> Tensors:
    """Initial values: A as PEFT draws it, B = 0, and a small head."""
    rng = np.random.default_rng(0)
    bound = WIDTH**-0.5
    tensors: dict[LayerKey, dict[str, Array]] = {}
    for layer in range(LAYERS):
        a, b = names(layer)
        first = rng.uniform(-bound, bound, (RANK, WIDTH)).astype(np.float32)
        tensors[layer] = {a: first, b: np.zeros((WIDTH, RANK), np.float32)}
    head = rng.normal(0, 0.02, (CLASSES, WIDTH)).astype(np.float32)
    return {**tensors, HEAD: {"head.weight": head, "head.bias": np.zeros(CLASSES, np.float32)}}


def layout(spec: AdapterSpec) -> Layout:
    """Layers and shapes of the tensors."""
    return {name: (key, array.shape) for key, name, array in flatten(fresh(spec))}


def logits(values: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Two dense layers with residual connections, and the head.

    Args:
        values: the trainable tensors of each client, with a first dimension for the clients.
        inputs: (clients, rows, width).
    """
    hidden = inputs
    for layer, weight in enumerate(frozen_weights()):
        a, b = (values[name] for name in names(layer))
        dense = hidden @ weight.T + SCALE * hidden @ a.mT @ b.mT
        hidden = functional.layer_norm(hidden + functional.gelu(dense), (WIDTH,))
    return hidden @ values["head.weight"].mT + values["head.bias"].unsqueeze(1)


def parameters_of(tensors: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """All tensors by name, stacked over the clients."""
    named = [{name: array for _, name, array in flatten(one)} for one in tensors]
    return {name: torch.from_numpy(np.stack([one[name] for one in named])) for name in named[0]}


def trained(instructions: Sequence[Instruction], clients: Sequence[Data]) -> list[Update]:
    """Train each client on all of its rows, and return the honest updates.

    All train at once, each with an AdamW of its own that stops when its rows are used up.
    """
    settings = instructions[0].training
    values = parameters_of([instruction.tensors for instruction in instructions])
    moments = {name: (torch.zeros_like(one), torch.zeros_like(one)) for name, one in values.items()}
    batches = [
        list(batches_of(instruction, data, settings.batch_size))
        for instruction, data in zip(instructions, clients, strict=True)
    ]
    losses = []
    left = 1 - (instructions[0].round - 1) / settings.rounds  # of the linear schedule
    for step in range(max(map(len, batches))):
        texts, labels = batch_of_all(clients, batches, step, settings.batch_size)
        for value in values.values():
            value.requires_grad_(True)
        each = functional.cross_entropy(
            logits(values, texts).flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view_as(labels)
        counts = (labels != IGNORED).sum(1)
        loss = each.sum(1) / counts.clamp(min=1)
        gradients = torch.autograd.grad(loss.sum(), list(values.values()))
        losses.append(loss.detach())
        busy = (counts > 0).float()
        with torch.no_grad():
            for (name, value), gradient in zip(list(values.items()), gradients, strict=True):
                head = name.startswith("head")
                rate = left * (settings.head_learning_rate if head else settings.learning_rate)
                first, second = moments[name]
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.001)
                change = first / (1 - 0.9 ** (step + 1))
                change /= (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                change += settings.weight_decay * value
                rates = (rate * busy).view(-1, *[1] * (value.dim() - 1))
                values[name] = value.detach() - rates * change
    return [
        honest_update(
            instruction,
            {name: value[index] for name, value in values.items()},
            data,
            [float(loss[index]) for loss in losses[: len(batches[index])]],
        )
        for index, (instruction, data) in enumerate(zip(instructions, clients, strict=True))
    ]


def batch_of_all(
    clients: Sequence[Data], batches: Sequence[Sequence[Labels]], step: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The texts and labels of a step for every client; labels are `IGNORED` where it has no row."""
    texts = np.zeros((len(clients), size, WIDTH), np.float32)
    labels = np.full((len(clients), size), IGNORED)
    for index, (data, own) in enumerate(zip(clients, batches, strict=True)):
        if step < len(own):
            texts[index, : len(own[step])] = data.texts[own[step]]
            labels[index, : len(own[step])] = data.labels[own[step]]
    return torch.from_numpy(texts), torch.from_numpy(labels)


def batches_of(instruction: Instruction, data: Data, size: int) -> Iterator[Labels]:
    """Rows of each step of a client: all of them in random order, in every epoch."""
    rng = np.random.default_rng((instruction.seed, instruction.round, instruction.client))
    for _ in range(instruction.budget.epochs or 0):
        order = rng.permutation(len(data.labels))
        yield from np.split(order, range(size, len(order), size))


def honest_update(
    instruction: Instruction,
    values: Mapping[str, torch.Tensor],
    data: Data,
    losses: Sequence[float],
) -> Update:
    """The update of a client that trained."""
    rows, steps = len(data.labels) * (instruction.budget.epochs or 0), len(losses)
    return Update(
        round=instruction.round,
        client=instruction.client,
        nonce=instruction.nonce,
        tensors={
            key: {name: values[name].numpy() for name in named}
            for key, named in instruction.tensors.items()
        },
        examples=rows,
        targets=rows,
        steps=steps,
        active_steps=(steps,) * LAYERS,
        importance=(0.0,) * LAYERS,
        train_loss=sum(losses) / steps,
        reward=None,
        cost=MeasuredCost(0.0, 0.0, 0.0, 0, rows, rows, (rows,) * LAYERS, (0,) * LAYERS, 0),
    )


def tampered(attack: Attack, instruction: Instruction, update: Update) -> Update:
    """The update that an attacker sends in the place of its own."""
    rng = np.random.default_rng((instruction.round, instruction.client))
    tamper, claimed = attack.tamper, attack.claims
    if tamper is not None:
        tensors = {
            key: {
                name: tamper(instruction.tensors[key][name], value, rng).astype(np.float32)
                for name, value in named.items()
            }
            for key, named in update.tensors.items()
        }
        update = replace(update, tensors=tensors)
    if claimed is not None:
        layers = (claimed,) * LAYERS
        cost = replace(update.cost, rows=claimed, tokens=claimed, layer_tokens=layers)
        update = replace(update, examples=claimed, targets=claimed, steps=claimed)
        update = replace(update, active_steps=layers, cost=cost)
    return update


class Attacked:
    """A transport in this process, on which some clients attack."""

    def __init__(self, clients: Sequence[Data], attack: Attack, attackers: set[int]) -> None:
        self.clients, self.attack, self.attackers = clients, attack, attackers

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        """Train all clients, and change the replies of attackers."""
        replies = trained(instructions, [self.data_of(one.client) for one in instructions])
        for index, (instruction, reply) in enumerate(zip(instructions, replies, strict=True)):
            if instruction.client in self.attackers and instruction.round >= self.attack.since:
                reply = tampered(self.attack, instruction, reply)
            yield Arrival(index, reply)

    def data_of(self, client: int) -> Data:
        """The rows on which a client trains."""
        data = self.clients[client]
        if client in self.attackers and self.attack.flips_labels:
            return replace(data, labels=CLASSES - 1 - data.labels)
        return data


def attackers_of(seed: int, share: float) -> set[int]:
    """The attackers; with a larger share they are the same and further ones."""
    order = seeds.numpy_generator(seed, purpose="attackers").permutation(CLIENTS)
    return {int(client) for client in order[: round(share * CLIENTS)]}


def clients_of(train: Data, config: Config) -> list[Data]:
    """Each client's rows."""
    parts = partition_rows(train.labels, None, config.clients, config.partition, config.seed)
    return [Data(train.texts[part.train], train.labels[part.train]) for part in parts]


def run_cell(
    data: tuple[Data, Data], seed: int, kind: str, attack: str, share: float, rule: str
) -> dict[str, Any]:
    """Run all rounds of a cell on training and test texts, and return its row."""
    train, test = data
    plain = load_config(None, [*SETTINGS, f"seed={seed}", *PARTITIONS[kind]])
    server = ServerConfig.model_validate(RULES[rule])
    config: Config = plain.model_copy(update={"server": server})
    setup = Setup(config, LAYERS, fresh, layout, clock=None)
    method = METHODS["fedlora"]
    attackers = attackers_of(seed, share)
    transport = Attacked(clients_of(train, config), ATTACKS[attack], attackers)
    state, clipped, limited, opposed, merged = method.init(setup), [], [], [], 0
    compare = each_round_alone if rule == EACH_ROUND else COMPARE
    for round in range(1, config.rounds + 1):
        with (
            patch.object(bounding, "_norms", whole_norms if rule == WHOLE else NORMS),
            patch.object(rounds, "compare_directions", compare),
            patch.object(direction_check, "FEWEST_DIRECTIONS", 10 if rule == OF_TEN else FEWEST),
        ):
            state, closed = run_round(setup, method, transport, state, round, lambda reply: None)
        clipped += closed.clipped
        limited += closed.limited
        opposed += closed.opposed
        merged += bool(closed.accepted)
    with torch.no_grad():
        values = parameters_of([state.model.tensors])
        found = logits(values, torch.from_numpy(test.texts).unsqueeze(0))[0]
    right = (found.argmax(1).numpy() == test.labels) & found.isfinite().all(1).numpy()
    return {
        "seed": seed,
        "partition": kind,
        "attack": attack,
        "share": share,
        "rule": rule,
        "accuracy": float(right.mean()),
        "merged_rounds": merged,
        "clipped": len(clipped),
        "clipped_honest": sum(client not in attackers for client in clipped),
        "limited": len(limited),
        "limited_honest": sum(client not in attackers for client in limited),
        "opposed": len(opposed),
        "opposed_honest": sum(client not in attackers for client in opposed),
    }


def whole_norms(*received: Any) -> dict[LayerKey, float]:
    """The norm of the whole change in the place of that of every layer."""
    norms = NORMS(*received)
    return dict.fromkeys(norms, math.hypot(*norms.values()))


def each_round_alone(*compared: Any) -> Directions:
    """The check without what it knows of earlier rounds."""
    return COMPARE(*compared[:-1], {})


def cells() -> Iterator[tuple[int, str, str, float, str]]:
    """Seed, partition, attack, share of attackers and rule of each cell, as they are run."""
    first = ("sign flip", "sign flip x 10", "sign flip x 100")
    others = [attack for attack in ATTACKS if attack not in (NO_ATTACK, *first)]
    tried = ("sign flip", "sign flip x 1.9", "sign flip x 10")
    plain = MAIN[0]
    for seed in (1, 2, 3, 0):
        yield seed, DIRICHLET, NO_ATTACK, 0.0, plain
        for rule in ("default", "bounds"):
            yield seed, DIRICHLET, NO_ATTACK, 0.0, rule
            for attack in first:
                yield seed, DIRICHLET, attack, 0.2, rule
    for kind in (UNLIKE, IID):
        for seed in (0, 1, 2):
            for rule in (plain, "bounds", "default"):
                yield seed, kind, NO_ATTACK, 0.0, rule
    for seed in (0, 1, 2):
        for rule in (plain, "bounds", OF_TEN):
            yield seed, TEN, NO_ATTACK, 0.0, rule
    for attack in (*first, *others):
        for rule in MAIN:
            yield 0, DIRICHLET, attack, 0.2, rule
    for attack in first:
        for rule in MAIN:
            yield 0, IID, attack, 0.2, rule
    for attack, share in ((NO_ATTACK, 0.0), *((attack, 0.2) for attack in first)):
        yield 0, DIRICHLET, attack, share, EACH_ROUND
    for share in (0.3, 0.1):
        for attack in (*first, *others[:-1]):
            for rule in MAIN:
                yield 0, DIRICHLET, attack, share, rule
    for kind, seed in ((DIRICHLET, 0), (IID, 0), *((DIRICHLET, seed) for seed in (1, 2, 3))):
        for rule in MAIN:
            yield seed, kind, NO_ATTACK, 0.0, rule
        for attack in first:
            yield seed, kind, attack, 0.2, "multi-Krum"
    for attack, share in ((NO_ATTACK, 0.0), *((attack, 0.2) for attack in tried)):
        for rule in ("multiple 1", "multiple 1.5", WHOLE):
            yield 0, DIRICHLET, attack, share, rule


def main() -> None:
    """Run the cells that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder that has ag_news")
    data = parser.parse_args().data
    torch.set_num_threads(1)
    known = read_table(NAME, "cells") if (FOLDER / NAME / "cells.csv.gz").exists() else []
    done = {tuple(row[name] for name in KEY) for row in known}
    left = [cell for cell in dict.fromkeys(cells()) if cell not in done]
    texts = projected(embedded(data, "train"), embedded(data, "test")) if left else None
    for cell in left:
        assert texts is not None
        row = run_cell(texts, *cell)
        append_rows(NAME, "cells", [row])
        print(*row.values(), sep=" | ", flush=True)
    settings = {"train_rows": TRAIN_ROWS, "test_rows": TEST_ROWS, "tokens": LENGTH}
    write_values(NAME, {**about(NAME, data=data), **settings, "settings": SETTINGS})


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
