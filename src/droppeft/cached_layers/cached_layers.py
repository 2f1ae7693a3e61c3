"""Behind the prefix in every step of a turn: states from the disk where they are, else made.

Source: ours.
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
from droppeft.data.tokens import TokenTable
from droppeft.errors import DroppeftError
from droppeft.layer_dropout.blocks import Gates
from droppeft.messages import CachedLayersCost, checked_run
from droppeft.tasks.classification import Batch, Classification

STATES, FORGOTTEN_AFTER_S = "frozen-prefix", 7 * 24 * 3600.0

STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Precision of stored states, by its name in the configuration."""


class CachedLayers:
    """The prefix at work in a turn: states of each step's rows, from the disk or new.

    With a store, an example's states are computed without padding, in a batch of one, and rounded
    to the stored precision even when they were computed just now: they are a function of the
    example, whoever else is in its batch and whatever was lost or evicted. Without a store they
    are computed for the batch as it is, in full precision, in every visit.

    Args:
        prefix: of the model that trains.
        store: the device's own, or ``None``.
        table, task: where rows and batches come from.
        steps: rows of every step of the turn.
        forward: a context for the forward: the run's autocast.
        at_hand: a context in which the prefix's weights are where it can run, in the midst of the
            turn.
    """

    def __init__(
        self,
        prefix: FrozenLayers,
        store: StateStore | None,
        table: TokenTable,
        task: Classification,
        steps: Sequence[Rows],
        forward: Callable[[], Any],
        at_hand: Callable[[], Any] = nullcontext,
    ) -> None:
        self.cost = CachedLayersCost()
        self._prefix = prefix
        self._store = store
        self._table, self._task, self._steps = table, task, steps
        self._forward, self._at_hand = forward, at_hand
        self._unvisited: set[int] = set()

    def build(self) -> None:
        """Make all states that the turn lacks now, and not when its steps come to them.

        It has a store. With one that cannot hold a turn's states some are made twice.
        """
        start = time.perf_counter()
        for row in dict.fromkeys(map(int, itertools.chain.from_iterable(self._steps))):
            digest = self._digest(row)
            if self._store is not None and self._store.get(digest) is None:
                self._made(row, digest, self._store)
                self._unvisited.add(row)
        if self._store is not None:
            self._store.flush()  # not in memory through all steps
        self._add(build_wall_s=time.perf_counter() - start)

    def skip(self, gates: Gates, step: int, batch: Batch) -> None:
        """Let a step start behind the prefix; the gates of the other layers stay as they are."""
        active = gates.active
        self._prefix.open(gates)
        self._prefix.skip(gates, active, self._states(self._steps[step], batch))

    def _states(self, rows: Rows, batch: Batch) -> torch.Tensor:
        """(B, S, H) in fp32: of the rows of a batch, zeros where it is padded."""
        start = time.perf_counter()
        if self._store is None:
            with self._at_hand():
                found = self._computed(batch)
            self._add(built=len(rows), built_tokens=batch["input_ids"].numel())
        else:
            found = self._padded([self._of_row(row, self._store) for row in rows], batch)
        self._add(build_wall_s=time.perf_counter() - start)
        return found

    def close(self) -> None:
        """Write what is new."""
        if self._store is not None:
            start = time.perf_counter()
            self._store.flush()
            self._add(stored_bytes=self._store.bytes, build_wall_s=time.perf_counter() - start)

    def _of_row(self, row: int, store: StateStore) -> torch.Tensor:
        digest = self._digest(row)
        states = store.get(digest)
        if states is None:
            self._unvisited.discard(row)
            with self._at_hand():
                return self._made(row, digest, store)
        if row in self._unvisited:
            self._unvisited.remove(row)
        else:
            self._add(hits=1)
        return states

    def _digest(self, row: int) -> str:
        columns = self._table.row(row)
        return digest_of(*(columns[name].tobytes() for name in self._task.inputs))

    def _made(self, row: int, digest: str, store: StateStore) -> torch.Tensor:
        alone = self._task.collate(self._table, np.asarray([row]))
        states = self._computed(alone)[0].to("cpu", STORED[store.precision])
        if not torch.isfinite(states).all():
            raise DroppeftError(
                f"hidden states behind layer {self._prefix.depth} do not fit into "
                f"{store.precision}; "
                "set frozen.precision=bf16"
            )
        store.put(digest, states)
        self._add(built=1, built_tokens=len(states))
        return states

    def _computed(self, batch: Batch) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self._forward():
            return self._prefix.states(inputs).float()

    def _padded(self, states: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        length = batch["input_ids"].shape[1]
        found = torch.zeros(len(states), length, states[0].shape[1])
        for place, one in zip(found, states, strict=True):
            place[: len(one)] = one
        return found.to(self._task.device)

    def _add(self, **amounts: float) -> None:
        sums = {name: getattr(self.cost, name) + value for name, value in amounts.items()}
        self.cost = replace(self.cost, **sums)


def state_folder(run: str) -> Path:
    """Where the states of a run's clients are stored; of no use after the run.

    Raises:
        DroppeftError: the run has no name; it comes from a server.
    """
    return cache_dir() / STATES / checked_run(run)


def forget_old_runs() -> None:
    """Delete states of runs that nothing was written for in a week.

    A run deletes its own when it ends where it was started. On other machines nobody tells that it
    has ended; should it go on after all, its states are made again, to the same bits.
    """
    folder = cache_dir() / STATES
    for run in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another process may be deleting there
            newest = max(path.stat().st_mtime for path in (run, *run.rglob("*")))
            if time.time() - newest > FORGOTTEN_AFTER_S:
                shutil.rmtree(run, ignore_errors=True)


def content_name(**facts: str | int) -> str:
    """Name everything but the example that its states depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
