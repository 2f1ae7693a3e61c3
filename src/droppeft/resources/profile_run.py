"""One local training on random tokens in a separate process, and what it took.

Ours. It is a client's local training as in a real run, with the same instruction, loop, gates,
frozen layers and optimizer.
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
from droppeft.data.tokens import TokenRows
from droppeft.federated_method import Setup
from droppeft.messages.instruction import Budget
from droppeft.messages.reply import Update
from droppeft.methods.droppeft import DROPPEFT
from droppeft.models.loading import Backbone
from droppeft.models.sources import find_source
from droppeft.resources.model_shape import CLASSES
from droppeft.resources.process_memory import (
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    return_freed_memory,
)
from droppeft.tasks.registry import task_named

WATTS_EVERY_S = 0.05


@dataclass(frozen=True)
class ProfileRun:
    """What one process measured.

    Attributes:
        step_s: mean time of a step.
        trained: mean number of blocks that a step trained.
        activation_bytes_peak: largest number of bytes that a step stored for the backward.
        process_bytes: resident memory after the libraries are loaded and a small model is trained,
            before the model is loaded; 0 on CUDA, where torch counts tensors only.
        peak_bytes: peak resident memory, or peak memory of torch on the CUDA device, during
            training and the computation of cached hidden states.
        with_loading: whether that peak includes loading the model, because this system cannot
            reset the peak.
        step_j: energy of a step, ``None`` where the hardware does not report it.
    """

    step_s: float
    trained: float
    activation_bytes_peak: int
    process_bytes: int
    peak_bytes: int
    with_loading: bool
    step_j: float | None


def run_steps(config: Config, steps: int, *, release_memory: bool) -> ProfileRun:
    """Load a model, train one step to warm up, and measure a local training.

    Args:
        config: resolved; its model, adapter, dropout, frozen layers and training settings are
            measured.
        steps: of the measured local training.
        release_memory: make resident memory equal the memory in use: return freed memory at once,
            and do not map weights from files. This takes time.
    """
    if release_memory:
        return_freed_memory()
    torch.set_num_threads(config.threads)
    cuda = config.accelerator == "cuda"
    # Models that are converted or unpacked are in the user's cache folder.
    config = config.model_copy(update={"model": find_source(config.model).readable})
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DROPPEFT_CACHE"] = cache  # hidden states after the frozen layers
        _train_small_model(config)
        gc.collect()
        process_bytes = 0 if cuda else resident_bytes()
        task = task_named(config.task)
        backbone = task.load_backbone(config, CLASSES, config.seed)
        if release_memory:
            _copy_mapped_weights(backbone.model)
        table = random_table(backbone, config)
        offload = config.training.offload
        model = ClientModel(backbone, task, config.accelerator, config.seed, offload=offload)
        with_loading = not _reset_peak(cuda)
        _train(model, table, config, round=1, steps=1)
        with _watts(cuda) as watts:
            update = _train(model, table, config, round=2, steps=steps)
        peak_bytes = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
    step_s = update.cost.train_wall_s / steps
    return ProfileRun(
        step_s=step_s,
        trained=sum(update.active_steps) / steps,
        activation_bytes_peak=update.cost.activation_bytes_peak,
        process_bytes=process_bytes,
        peak_bytes=peak_bytes,
        with_loading=with_loading,
        step_j=step_s * sum(watts) / len(watts) if watts else None,
    )


def _train(model: ClientModel, table: TokenRows, config: Config, round: int, steps: int) -> Update:
    """A local training in which every step has all rows of the table.

    All calls have the same configuration, so that a later one finds the hidden states that an
    earlier one cached.
    """
    setup = Setup(config, model.num_layers, model.fresh_tensors, model.layout, None, run="0")
    [instruction] = DROPPEFT.instruct(setup, DROPPEFT.init(setup), round, [0])
    instruction = replace(instruction, budget=Budget(steps=steps))
    rows = np.arange(len(table))
    return Client(model, table, ClientRows(rows, rows[:0], rows[:0])).train(instruction)


def random_table(backbone: Backbone, config: Config) -> TokenRows:
    """One batch of random rows. The second row is shorter, since real batches have padding."""
    rng = seeds.numpy_generator(config.seed, purpose="random tokens")
    rows = config.training.batch_size
    lengths = np.full(rows, config.training.max_length)
    lengths[1:2] -= 1
    embeddings: nn.Embedding = backbone.model.get_input_embeddings()  # type: ignore[operator]
    tokens = rng.integers(embeddings.num_embeddings, size=lengths.sum(), dtype=np.int32)
    columns = {name: np.zeros_like(tokens) for name in backbone.inputs}
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    table = TokenRows({**columns, "input_ids": tokens}, offsets)
    return task_named(config.task).labelled(table, len(CLASSES), rng)


def _train_small_model(config: Config) -> None:
    """Make the libraries load their code and allocate their caches before the measurement.

    The small model is a classifier, since none that generates text is at hand everywhere.
    """
    small = {"batch_size": 2, "max_length": 8}
    config = Config(
        method=DROPPEFT.name,
        quantization=config.quantization,
        accelerator=config.accelerator,
        training=config.training.model_copy(update=small),
    )
    task = task_named(config.task)
    backbone = task.load_backbone(config, CLASSES, config.seed)
    table = random_table(backbone, config)
    model = ClientModel(backbone, task, config.accelerator, config.seed)
    _train(model, table, config, round=1, steps=1)


def _copy_mapped_weights(model: nn.Module) -> None:
    """Copy weights that are mapped from a file, of which only pages that were read are resident.

    Resident memory then includes all weights, and no pages that were read only to quantise them.
    """
    for value in model.parameters():
        if value.is_floating_point():
            value.data = value.data.clone()


def _reset_peak(cuda: bool) -> bool:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    return reset_peak()


@contextmanager
def _watts(cuda: bool) -> Iterator[list[float]]:
    """Sample the power (W) of the CUDA device inside; no samples where it is not reported."""
    samples: list[float] = []
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(WATTS_EVERY_S):
            samples.append(torch.cuda.power_draw() / 1000)

    if not (cuda and _reports_power()):
        yield samples
        return
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        stopped.set()
        sampler.join()


def _reports_power() -> bool:
    """Whether power can be read. It needs a package besides torch, which raises its own errors."""
    try:
        return bool(torch.cuda.power_draw() > 0)
    except Exception:
        return False
