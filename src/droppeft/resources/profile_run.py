"""One turn of training on random tokens, in a process of its own, and what it took.

Ours. The turn is a device's of a real run: the same instruction, loop, gates, frozen prefix and
optimizer.
"""

import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from droppeft import seeds
from droppeft.client.client import Client
from droppeft.client.client_model import ClientModel
from droppeft.config import Config
from droppeft.data.partition import ClientRows
from droppeft.data.tokens import TokenTable
from droppeft.federated_method import Setup
from droppeft.messages import Budget, Update
from droppeft.methods.droppeft import DROPPEFT
from droppeft.models.loading import Backbone, load_backbone
from droppeft.resources.model_shape import CLASSES
from droppeft.resources.process_memory import (
    forget_peak,
    give_memory_back,
    peak_resident_bytes,
    resident_bytes,
)

WATTS_EVERY_S = 0.05


@dataclass(frozen=True)
class ProfileRun:
    """What one process found.

    Attributes:
        step_s: mean time of a step.
        executed: blocks that ran in a step, on average.
        activation_bytes_peak: stored for the backward in any step.
        process_bytes: resident with all libraries loaded and a first small turn taken, before the
            model; 0 on CUDA, where torch counts tensors alone.
        peak_bytes: most that was resident in a step, or that torch had on the CUDA device; the
            first visit to the examples included.
        with_loading: whether that peak contains loading the model, because this system cannot
            start its count anew.
        step_j: energy of a step, ``None`` where the hardware does not report it.
    """

    step_s: float
    executed: float
    activation_bytes_peak: int
    process_bytes: int
    peak_bytes: int
    with_loading: bool
    step_j: float | None


def run_steps(config: Config, steps: int, *, frugal: bool) -> ProfileRun:
    """Load a model, take one step to warm up, and a turn that is measured.

    Args:
        config: resolved; its model, adapter, dropout, frozen prefix and training are what is tried.
        steps: of the measured turn.
        frugal: keep resident what is in use, and all of that: give freed memory back at once, and
            map no weights from files. Costs time.
    """
    if frugal:
        give_memory_back()
    torch.set_num_threads(config.threads)
    cuda = config.accelerator == "cuda"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DROPPEFT_CACHE"] = cache  # hidden states behind a frozen prefix
        _first_small_turn(config)
        gc.collect()
        process_bytes = 0 if cuda else resident_bytes()
        backbone = load_backbone(config.model, CLASSES, config.seed, config.quantization)
        if frugal:
            _let_go_of_files(backbone.model)
        table = random_table(backbone, config)
        offload = config.training.offload
        model = ClientModel(backbone, config.accelerator, config.seed, offload=offload)
        with_loading = not _forget_peak(cuda)
        _turn(model, table, config, round=1, steps=1)
        with _watts(cuda) as watts:
            update = _turn(model, table, config, round=2, steps=steps)
        peak_bytes = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
    step_s = update.cost.train_wall_s / steps
    return ProfileRun(
        step_s=step_s,
        executed=sum(update.active_steps) / steps,
        activation_bytes_peak=update.cost.activation_bytes_peak,
        process_bytes=process_bytes,
        peak_bytes=peak_bytes,
        with_loading=with_loading,
        step_j=step_s * sum(watts) / len(watts) if watts else None,
    )


def _turn(model: ClientModel, table: TokenTable, config: Config, round: int, steps: int) -> Update:
    """A turn in which every step has all rows of the table.

    The configuration is the same in all turns, so that a later one finds the hidden states that an
    earlier one left.
    """
    setup = Setup(config, model.num_layers, model.fresh_tensors, model.layout, None, run="0")
    [plan] = DROPPEFT.instruct(setup, DROPPEFT.init(setup), round, [0])
    plan = replace(plan, budget=Budget(steps=steps))
    rows = np.arange(len(table))
    return Client(model, table, ClientRows(rows, rows[:0], rows[:0])).train(plan)


def random_table(backbone: Backbone, config: Config) -> TokenTable:
    """As many rows as a batch has; the second is shorter, since real batches have padding."""
    rng = seeds.numpy_generator(config.seed, purpose="random tokens")
    rows = config.training.batch_size
    lengths = np.full(rows, config.training.max_length)
    lengths[1:2] -= 1
    embeddings: nn.Embedding = backbone.model.get_input_embeddings()  # type: ignore[operator]
    tokens = rng.integers(embeddings.num_embeddings, size=lengths.sum(), dtype=np.int32)
    columns = {name: np.zeros_like(tokens) for name in backbone.inputs}
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = rng.integers(len(CLASSES), size=rows)
    return TokenTable({**columns, "input_ids": tokens}, offsets, labels)


def _first_small_turn(config: Config) -> None:
    """Have libraries read their code and set up what they keep, before anything is measured."""
    small = {"batch_size": 2, "max_length": 8}
    config = Config(
        quantization=config.quantization,
        accelerator=config.accelerator,
        training=config.training.model_copy(update=small),
    )
    backbone = load_backbone(config.model, CLASSES, config.seed, config.quantization)
    table = random_table(backbone, config)
    model = ClientModel(backbone, config.accelerator, config.seed)
    _turn(model, table, config, round=1, steps=1)


def _let_go_of_files(model: nn.Module) -> None:
    """Copy weights that are mapped from a file, and come into memory in pages of it, as read.

    What is resident is then the weights, all of them, and not what was read to quantise them.
    """
    for value in model.parameters():
        if value.is_floating_point():
            value.data = value.data.clone()


def _forget_peak(cuda: bool) -> bool:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    return forget_peak()


@contextmanager
def _watts(cuda: bool) -> Iterator[list[float]]:
    """Power of the CUDA device, sampled inside; nothing where it cannot be read."""
    found: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(WATTS_EVERY_S):
            found.append(torch.cuda.power_draw() / 1000)

    if not (cuda and _reports_power()):
        yield found
        return
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        over.set()
        sampler.join()


def _reports_power() -> bool:
    """NVML is reached through a package that torch does not bring along, with errors of its own."""
    try:
        return bool(torch.cuda.power_draw() > 0)
    except Exception:
        return False
