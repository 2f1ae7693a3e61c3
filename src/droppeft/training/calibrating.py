"""Measure what each layer of a model is worth: what skipping it costs, and what training it brings.

Ours. To measure a layer, the layers below it need not run again: their output is that of the full
model, so that all layers together take about half as many layer passes as one model per layer.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenRows, ordered_batches
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import Calibration, gated
from droppeft.layer_dropout.architectures import hidden_of
from droppeft.layer_dropout.blocks import Gates
from droppeft.layer_dropout.module_attributes import own_layerdrop_off
from droppeft.messages.instruction import LocalTraining
from droppeft.messages.tensors import HEAD
from droppeft.models.key_value_cache import without_cache
from droppeft.models.precision import autocast, loss_scaler
from droppeft.tasks.task import Batch
from droppeft.training.checkpointing import checkpointed
from droppeft.training.loop import Trainable, computing_in

FEWEST_ROWS = 4
"""With fewer rows nothing is measured: half of them may be needed to train a head."""

HEAD_RATE, HEAD_STEPS, HEAD_PATIENCE = 3e-3, 200, 20
"""Learning rate of Adam that trains a new head, most steps, and steps without a smaller loss on
rows that are held out after which it ends."""

HELD_OUT = 4
"""One of so many rows for the head is held out, because a wide head learns the others by heart."""

NOT_FINITE = 1e4
"""Added loss (nats) of a layer without which the loss is not finite."""

Progress = Callable[[int, int], None]
"""Called with the number of passes through the model that are done, and that of all."""

Vector = npt.NDArray[np.float64]
T = TypeVar("T")


def calibrate(
    on: Trainable,
    table: TokenRows,
    rows: Rows,
    settings: LocalTraining,
    *,
    fit_head: bool,
    progress: Progress = lambda done, of: None,
) -> Calibration:
    """Measure what each layer is worth.

    The adapter should have its initial values. Dropout is off.

    A classifier whose head is new has the loss log(C), whatever is skipped. Its head alone is
    therefore trained first, on one half of the rows, with the hidden states of the full model. All
    layers are then measured on the other half.

    Args:
        on: the model with an adapter. Its trained head keeps the values that it gets here.
        table: tokenised rows.
        rows: those that are used, in random order.
        settings: batch size, micro batch size, precision and checkpointing.
        fit_head: whether the head is new.
        progress: see :data:`Progress`.

    Raises:
        DroppeftError: there are fewer than :data:`FEWEST_ROWS` rows, or the loss of the full model
            is not finite.
    """
    if len(rows) < FEWEST_ROWS:
        raise DroppeftError(
            f"{len(rows)} rows are too few to measure what layers are worth, which takes "
            f"{FEWEST_ROWS} or more; use more data"
        )
    start = time.perf_counter()
    number = len(rows) // 2 if fit_head else 0
    held_out, for_head, measured = np.split(rows, [-(-number // HELD_OUT), number])

    def batches_of(part: Rows) -> list[Batch]:
        chosen = ordered_batches(part, table.lengths, settings.rows_at_once)
        return [on.task.collate(table, batch) for batch in chosen]

    head_batches, batches = [*map(batches_of, (for_head, held_out))], batches_of(measured)
    first = sum(map(len, head_batches))
    passes = _Passes(progress, first + len(batches) * (len(on.blocks) + 2))
    on.model.eval()
    with _ready(on, settings), gated(on.blocks) as gates:
        model = _Model(on, settings, gates, passes)
        if first:
            model.fit_head(*head_batches)
        losses, targets = model.losses(batches)
        gradient, state_gradient = model.gradients(batches)
    loss = float(losses[:, 0].sum() / targets.sum())
    if not math.isfinite(loss):
        raise DroppeftError(
            "the loss of the model is not finite before training: its weights are damaged, or "
            f"training.precision={settings.precision} is too coarse for it"
        )
    added, error = added_losses(losses[:, 0], losses[:, 1:], targets)
    return Calibration(
        added_loss=tuple(added.tolist()),
        added_loss_error=tuple(error.tolist()),
        gradient=gradient,
        state_gradient=state_gradient,
        loss=loss,
        rows=len(measured),
        targets=int(targets.sum()),
        tokens=int(table.lengths[measured].sum()),
        head_rows=number,
        calibration_wall_s=time.perf_counter() - start,
    )


def added_losses(full: Vector, skipped: Vector, targets: Vector) -> tuple[Vector, Vector]:
    """Return the added loss of a target for each layer, and its standard error over the rows.

    Args:
        full: (R,) loss of each row, summed over its targets.
        skipped: (R, L) the same without a layer.
        targets: (R,) number of targets of each row.

    Returns:
        Two arrays (L,). The error is that of a ratio of two sums, in which rows are independent.
    """
    rows, total = len(full), targets.sum()
    with np.errstate(invalid="ignore", over="ignore"):
        differences = skipped - full[:, None]
        added = differences.sum(axis=0) / total
        spread = differences - targets[:, None] * added
        error = np.sqrt(rows / max(rows - 1, 1) * np.square(spread).sum(axis=0)) / total
    known = np.isfinite(added) & np.isfinite(error)
    return np.where(known, added, NOT_FINITE), np.where(known, error, 0.0)


@contextmanager
def _ready(on: Trainable, settings: LocalTraining) -> Iterator[None]:
    """Prepare a model as for training, without its key-value cache and its own layer dropping."""
    with (
        computing_in(settings.precision, on.model, on.task.device),
        without_cache(on.model),
        own_layerdrop_off(on.model),
        checkpointed(on.model, on.blocks, lambda call: None)
        if settings.checkpointing
        else nullcontext(),
    ):
        yield


class _Passes:
    """Counts the passes through the model."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        progress(0, total)

    def done(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


class _Model:
    """A gated model in evaluation mode, of which some layers are skipped."""

    def __init__(
        self, on: Trainable, settings: LocalTraining, gates: Gates, passes: _Passes
    ) -> None:
        self.on, self.settings, self.gates, self.passes = on, settings, gates, passes

    def fit_head(self, batches: Sequence[Batch], held_out: Sequence[Batch]) -> None:
        """Train the head alone, with no layer run: the states after the last one are stored.

        It keeps the values with the smallest loss on the rows that are held out.
        """
        values = list(self.on.parameters.get(HEAD, {}).values())
        with torch.no_grad():
            after, after_held_out = (
                [self._full(batch)[0][-1] for batch in part] for part in (batches, held_out)
            )
        optimizer = torch.optim.Adam(values, lr=HEAD_RATE)
        best, kept, chosen = math.inf, 0, [value.detach().clone() for value in values]
        for step in range(1, HEAD_STEPS + 1):
            self._of_head(batches, after, torch.Tensor.backward)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                now = math.fsum(self._of_head(held_out, after_held_out, float))
            if now < best:
                best, kept, chosen = now, step, [value.detach().clone() for value in values]
            elif step >= kept + HEAD_PATIENCE:
                break
        with torch.no_grad():
            for value, good in zip(values, chosen, strict=True):
                value.copy_(good)

    def _of_head(
        self,
        batches: Sequence[Batch],
        after: Sequence[torch.Tensor],
        use: Callable[[torch.Tensor], T],
    ) -> list[T]:
        """Use the loss of each batch, of which only the head is computed."""
        total = sum(map(self.on.task.targets, batches))
        used = []
        for batch, states in zip(batches, after, strict=True):
            self._enter_after(len(self.on.blocks) - 1, states)
            used.append(use(self._loss(batch, total)))
        return used

    def losses(self, batches: Sequence[Batch]) -> tuple[Vector, Vector]:
        """Return the losses (R, 1 + L) of rows, full and without each layer, and the targets."""
        parts = [self._losses(batch) for batch in batches]
        losses, targets = zip(*parts, strict=True)
        return np.concatenate(losses), np.concatenate(targets)

    @torch.no_grad()
    def _losses(self, batch: Batch) -> tuple[Vector, Vector]:
        states, full, targets = self._full(batch)
        found = [full]
        for layer in range(len(self.on.blocks)):
            # What enters a layer that is skipped also leaves it.
            self._enter_after(layer, states[layer])
            found.append(self._row_losses(batch)[0])
        return _as_array(torch.stack(found, dim=1)), _as_array(targets)

    def _full(self, batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return the L + 1 states before, between and after the layers, losses, and targets."""
        self._open()
        with _recording(self.on.blocks) as states:
            return states, *self._row_losses(batch)

    def _open(self) -> None:
        self.gates.active, self.gates.replacements = (True,) * len(self.on.blocks), {}

    def _enter_after(self, layer: int, states: torch.Tensor) -> None:
        """Let the next forward pass begin after a layer, with these states (B, S, H)."""
        below, above = layer + 1, len(self.on.blocks) - layer - 1
        self.gates.active = (False,) * below + (True,) * above
        self.gates.replacements = {layer: states}

    def _row_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with self._autocast():
            found = self.on.task.losses_by_row(self.on.model, batch)
        self.passes.done()
        return found

    def _loss(self, batch: Batch, total: int) -> torch.Tensor:
        """Return the part of a batch in the mean loss of ``total`` targets."""
        with self._autocast():
            loss = self.on.task.loss(self.on.model, batch)
        return loss * (self.on.task.targets(batch) / total)

    def gradients(self, batches: Sequence[Batch]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return ``gradient`` and ``state_gradient`` of a calibration, for the mean loss."""
        on = self.on
        self._open()
        # In fp16 small gradients would vanish.
        scale = loss_scaler(self.settings.precision, on.task.device).get_scale()
        total = sum(map(on.task.targets, batches))
        with _squared_gradients(on.blocks) as squares:
            for batch in batches:
                (self._loss(batch, total) * scale).backward()  # type: ignore[no-untyped-call]
                self.passes.done()
        gradient = [_absolute_sum(on, layer) / scale for layer in range(len(on.blocks))]
        for value in on.values:
            value.grad = None
        return tuple(gradient), tuple(math.sqrt(square) / scale for square in squares)

    def _autocast(self) -> Any:
        return autocast(self.settings.precision, self.on.task.device)


def _absolute_sum(on: Trainable, layer: int) -> float:
    """Return the sum of the absolute gradients of a layer's adapter; a value may have none."""
    gradients = [value.grad for value in on.parameters.get(layer, {}).values()]
    return math.fsum(float(one.abs().sum()) for one in gradients if one is not None)


def _as_array(values: torch.Tensor) -> Vector:
    array: Vector = values.double().cpu().numpy()
    return array


@contextmanager
def _recording(blocks: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Record the hidden states (B, S, H) before each of L blocks, and after the last one."""
    states: list[torch.Tensor] = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(hidden_of((args, kwargs)).detach())

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(_hidden(output).detach())

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(leave))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _squared_gradients(blocks: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Sum the squared gradients of each block's output over the backward passes inside."""
    squares = [0.0] * len(blocks)

    def watch(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(gradient: torch.Tensor) -> None:
            squares[layer] += float(gradient.float().square().sum())

        def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states = _hidden(output)
            if states.requires_grad:
                states.register_hook(note)  # type: ignore[no-untyped-call]

        return leave

    hooks = [block.register_forward_hook(watch(layer)) for layer, block in enumerate(blocks)]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states
