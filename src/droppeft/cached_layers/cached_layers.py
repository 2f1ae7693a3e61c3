"""Replaces the frozen layers in the steps of a local training by their stored output.

Here *states* are the hidden states after the last frozen layer. Ours.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from droppeft.cached_layers.frozen_layers import FrozenLayers
from droppeft.cached_layers.state_store import StateStore, digest_of
from droppeft.data.cache import cache_dir
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenRows
from droppeft.errors import DroppeftError
from droppeft.layer_dropout.blocks import Gates
from droppeft.messages.instruction import checked_run
from droppeft.messages.reply import CachedLayersCost
from droppeft.tasks.task import Batch, BoundTask, model_inputs

STATES = "cached-layers"
"""Folder of the stored states in the cache folder."""

DELETED_AFTER_S = 7 * 24 * 3600.0
"""Age in seconds after which the states of a run are deleted."""

STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Data type of stored states, by its name in the configuration."""


class CachedLayers:
    """The output of the frozen layers in one local training, read from disk or computed.

    With a store, the states of a row are computed in a batch of its own, without padding. They are
    always rounded to the stored precision, also if they have just been computed. The states thus
    depend on the row alone, and not on its batch or on which states were lost or evicted. Without
    a store the states are computed for whole batches, in full precision, in every step.

    Args:
        frozen_layers: the frozen layers of the model that is trained.
        store: the client's stored states, or ``None``.
        table: tokenised rows.
        task: makes batches of rows.
        steps: rows of every step of the local training.
        forward: creates a context for the forward pass: the run's autocast.
        frozen_in_memory: creates a context in which the weights of the frozen layers are in memory,
            in case states must be computed during the steps.

    Attributes:
        cost: what has been read, computed and stored so far.
    """

    def __init__(
        self,
        frozen_layers: FrozenLayers,
        store: StateStore | None,
        table: TokenRows,
        task: BoundTask,
        steps: Sequence[Rows],
        forward: Callable[[], Any],
        frozen_in_memory: Callable[[], Any] = nullcontext,
    ) -> None:
        self.cost = CachedLayersCost()
        self._frozen_layers = frozen_layers
        self._store = store
        self._table, self._task, self._steps = table, task, steps
        self._forward, self._frozen_in_memory = forward, frozen_in_memory
        self._built_unread: set[int] = set()

    def build(self) -> None:
        """Compute all states that are not stored yet, before the steps need them.

        Only with a store. If the store cannot hold the states of all steps, some are computed
        twice.
        """
        start = time.perf_counter()
        for row in dict.fromkeys(map(int, itertools.chain.from_iterable(self._steps))):
            digest = self._digest(row)
            if self._store is not None and self._store.get(digest) is None:
                self._compute_row(row, digest, self._store)
                self._built_unread.add(row)
        if self._store is not None:
            self._store.flush()  # so that they do not stay in memory during the steps
        self._add(build_wall_s=time.perf_counter() - start)

    def skip(self, gates: Gates, step: int, batch: Batch) -> None:
        """Let a step start after the frozen layers; the other layers' gates stay unchanged."""
        modes = gates.modes
        self._frozen_layers.open(gates)
        self._frozen_layers.skip(gates, modes, self._states(self._steps[step], batch))

    def _states(self, rows: Rows, batch: Batch) -> torch.Tensor:
        """Return the states (B, S, H) of a batch in fp32, with zeros where it is padded."""
        start = time.perf_counter()
        if self._store is None:
            with self._frozen_in_memory():
                states = self._compute_batch(batch)
        else:
            states = self._pad([self._of_row(row, self._store) for row in rows], batch)
        self._add(build_wall_s=time.perf_counter() - start)
        return states

    def close(self) -> None:
        """Write new states to disk."""
        if self._store is not None:
            start = time.perf_counter()
            self._store.flush()
            self._add(stored_bytes=self._store.bytes, build_wall_s=time.perf_counter() - start)

    def _of_row(self, row: int, store: StateStore) -> torch.Tensor:
        digest = self._digest(row)
        states = store.get(digest)
        if states is None:
            self._built_unread.discard(row)
            with self._frozen_in_memory():
                return self._compute_row(row, digest, store)
        if row in self._built_unread:
            self._built_unread.remove(row)
        else:
            self._add(hits=1)
        return states

    def _digest(self, row: int) -> str:
        columns = self._table.row(row)
        return digest_of(*(columns[name].tobytes() for name in self._task.inputs))

    def _compute_row(self, row: int, digest: str, store: StateStore) -> torch.Tensor:
        alone = self._task.collate(self._table, np.asarray([row]))
        states = self._compute_batch(alone)[0].to("cpu", STORED[store.precision])
        if not torch.isfinite(states).all():
            raise DroppeftError(
                f"hidden states after frozen layer {self._frozen_layers.depth} do not fit into "
                f"{store.precision}; set frozen.precision=bf16"
            )
        store.put(digest, states)
        self._add(built=1, built_tokens=len(states))
        return states

    def _compute_batch(self, batch: Batch) -> torch.Tensor:
        with self._forward():
            return self._frozen_layers.states(model_inputs(batch)).float()

    def _pad(self, states: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        length = batch["input_ids"].shape[1]
        padded = torch.zeros(len(states), length, states[0].shape[1])
        for target, row_states in zip(padded, states, strict=True):
            target[: len(row_states)] = row_states
        return padded.to(self._task.device)

    def _add(self, **amounts: float) -> None:
        sums = {name: getattr(self.cost, name) + value for name, value in amounts.items()}
        self.cost = replace(self.cost, **sums)


def state_folder(run: str) -> Path:
    """Return the folder of all states of a run; they are not needed after the run.

    Raises:
        DroppeftError: the name of the run, which the server sent, is not valid.
    """
    return cache_dir() / STATES / checked_run(run)


def bytes_of_other_runs(run: str, client: int) -> int:
    """Return the bytes of the states of a client in all runs but one."""
    total = 0
    for path in (cache_dir() / STATES).glob(f"*/client-{client:06}/*"):
        with contextlib.suppress(FileNotFoundError):  # another process may have deleted it
            total += path.stat().st_size if path.parent.parent.name != run else 0
    return total


def delete_old_runs() -> None:
    """Delete the states of runs for which nothing was written in a week.

    When a run ends, its states are deleted on the machine where it was started. Other machines are
    not told that it has ended. If a run continues after its states were deleted, the same states
    are computed again.
    """
    folder = cache_dir() / STATES
    for run in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another process may delete the same files
            newest = max(path.stat().st_mtime for path in (run, *run.rglob("*")))
            if time.time() - newest > DELETED_AFTER_S:
                shutil.rmtree(run, ignore_errors=True)


def content_name(**facts: str | int) -> str:
    """Return a hash of everything that states depend on, except the row."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
