"""How many clients of a run train at a time on this machine. Ours."""

from dataclasses import dataclass

import psutil
import torch

from droppeft.config import Config, available_cores
from droppeft.costs.modelled_clock import Clock
from droppeft.costs.step_memory import step_memory
from droppeft.federated_method import adapter_spec
from droppeft.transports.forked_processes import can_fork

OWN_BYTES = 300_000_000
"""Memory of a worker without weights, activations and optimizer: pages of the interpreter and the
libraries that it writes to, and workspaces of matrix products."""

USABLE = 0.8
"""Share of the memory that is free, which workers may take."""


@dataclass(frozen=True)
class WorkerCount:
    """How many clients train at a time.

    Attributes:
        number: 1 or more.
        why_fewer: why it is less than was asked for, as a sentence; ``None`` if it is not.
    """

    number: int
    why_fewer: str | None = None


def count_workers(config: Config, clock: Clock | None, num_layers: int) -> WorkerCount:
    """Choose the number of workers: what was asked for, else what cores and memory allow.

    Args:
        config: resolved.
        clock: has counted a step; without it, the memory of a step is not known.
        num_layers: number L of the backbone's layers.
    """
    if config.partition.kind == "sites" and not config.sites:
        return WorkerCount(1)  # clients are on other machines
    asked, reason = config.workers, _why_one(config)
    if reason is not None:
        sentence = f"workers={asked}: clients train one after another, because {reason}"
        return WorkerCount(1, sentence if asked > 1 else None)
    if asked:
        return WorkerCount(min(asked, config.drawn))
    most = min(available_cores() // config.threads, config.drawn)
    if most > 1:
        most = min(most, _that_fit(config, clock, num_layers))
    return WorkerCount(max(most, 1))


def _why_one(config: Config) -> str | None:
    """Why only the server's own process can train; ``None`` if others can."""
    if config.transport == "flower":
        return None  # its processes share nothing
    if not can_fork():
        return "this system cannot share a model among processes"
    if config.accelerator != "cpu":
        return f"accelerator={config.accelerator} cannot be shared by processes"
    if torch.cuda.is_available():
        return "torch cannot train in several processes where it has found a CUDA device"
    if config.training.offload:
        return "training.offload leaves the weights of one process in a file"
    return None


def _that_fit(config: Config, clock: Clock | None, num_layers: int) -> int:
    """How many workers fit into the memory that is free beside the model."""
    if clock is None:
        return 1
    frozen = config.frozen.count
    spec = adapter_spec(config.adapter, num_layers, frozen)
    longest = max(clock.arithmetic(spec).counts, key=lambda counts: counts.length)
    memory = step_memory(
        longest, num_layers - frozen, frozen, process=OWN_BYTES, cached=config.frozen.cache
    )
    shared = memory.weights if config.transport == "in_process" else 0
    return int(USABLE * psutil.virtual_memory().available) // (memory.total - shared)
