"""Train adapters for some batches, and evaluate at full depth: one plain loop each.

The gate per mini-batch is stochastic transformer layer dropout (arXiv:2503.10217); the loop
around it is ours.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from droppeft.adapters.by_layer import Parameters
from droppeft.cached_layers.cached_layers import CachedLayers
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenTable, grouped_batches, ordered_batches
from droppeft.layer_dropout import gated
from droppeft.messages import HEAD, TASK_ALONE, Budget, LocalTraining, Objective, Tensors
from droppeft.models.key_value_cache import without_cache
from droppeft.models.precision import autocast, loss_scaler, move
from droppeft.tasks.classification import Batch, Classification, accuracy_and_f1
from droppeft.training.activation_memory import ActivationMeter
from droppeft.training.checkpointing import checkpointed
from droppeft.training.gradients import GradientMoments, Gradients, total_norm
from droppeft.training.objectives import Terms


@dataclass(frozen=True)
class TrainOutcome:
    """What a turn of training did.

    A step that was skipped since fp16 overflowed has been paid for, but nothing was learnt: it
    counts in ``steps``, ``rows`` and tokens, in the activations and the time, and nowhere else.

    Attributes:
        steps: batches, each one step of the optimizer unless it was skipped.
        examples: rows trained on, repeats counted.
        tokens: tokens computed, padding included.
        rows: rows computed.
        layer_tokens: per layer, how many of the tokens it computed.
        loss: mean over steps; not a number if all were skipped.
        active_steps: per layer, in how many steps it ran.
        gradients: of the layers' adapters, of the task's loss.
        activation_bytes_peak: see :class:`~droppeft.training.activation_memory.ActivationMeter`.
        wall_s: the steps alone.
    """

    steps: int
    examples: int
    tokens: int
    rows: int
    layer_tokens: tuple[int, ...]
    loss: float
    active_steps: tuple[int, ...]
    gradients: GradientMoments
    activation_bytes_peak: int
    wall_s: float

    @property
    def importance(self) -> tuple[float, ...]:
        """Per layer, mean over its active steps of its gradient's norm; 0 without one."""
        return tuple(float(value) for value in self.gradients.norm)


@dataclass(frozen=True)
class Evaluation:
    """Quality at full depth: mean loss, accuracy, F1, rows, and what measuring took.

    ``tokens`` are those that were computed, padding included.
    """

    loss: float
    accuracy: float
    f1: float
    rows: int
    wall_s: float
    tokens: int


@dataclass(frozen=True)
class Trainable:
    """A model, and which part of it is trained.

    Attributes:
        model: with adapters attached.
        blocks: its L layers, as :func:`droppeft.layer_dropout.find_blocks` gives them.
        parameters: what is trained, by layer.
        task: batches, loss and metrics.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    parameters: Parameters
    task: Classification

    @property
    def values(self) -> list[nn.Parameter]:
        """What is trained, in order."""
        return [value for named in self.parameters.values() for value in named.values()]


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        batch: what it is computed on.
        active: which of the L layers run.
        rate_factor: part of the peak learning rates in force.
    """

    batch: Batch
    active: Sequence[bool]
    rate_factor: float


def train(
    on: Trainable,
    steps: Sequence[Step],
    settings: LocalTraining,
    objective: Objective = TASK_ALONE,
    cached: CachedLayers | None = None,
    *,
    with_mean_gradient: bool = False,
    anchors: Tensors | None = None,
) -> TrainOutcome:
    """Take one AdamW step per batch; layers that a step drops are left exactly as they were.

    A dropped layer has no gradient in that step (not a zero one), so that AdamW neither moves
    nor decays it. The optimizer and, in fp16, the scale of the loss start afresh: nothing but the
    adapter outlives the local training. A step that fp16 makes overflow is skipped: it moves
    nothing, momentum included, and uses up its batch, its gates and its place in the schedule.

    Args:
        on: what is trained.
        steps: in order.
        settings: learning rates, precision and the like.
        objective: what is added to the task's loss.
        cached: stands for the first layers in every step; they do not run, and count as dropped.
        with_mean_gradient: see :class:`~droppeft.training.gradients.Gradients`.
        anchors: see :class:`~droppeft.training.objectives.Terms`.
    """
    loop = _Loop(on, settings, Terms(objective, on.parameters, anchors), with_mean_gradient)
    on.model.train()
    start = time.perf_counter()
    with without_cache(on.model), loop.recomputing(), gated(on.blocks) as gates:
        for place, step in enumerate(steps):
            gates.active = tuple(step.active)
            if cached is not None:
                cached.skip(gates, place, step.batch)
            loop.take(step, gates.active)
    if on.task.device.type == "cuda":
        torch.cuda.synchronize()  # the time is that of work done, not of work ordered
    return loop.book.outcome(loop.meter.peak_bytes, time.perf_counter() - start)


class _Loop:
    """What the steps of a local training share: the optimizer, and what is counted."""

    def __init__(
        self, on: Trainable, settings: LocalTraining, terms: Terms, with_mean_gradient: bool
    ) -> None:
        self.on, self.settings, self.terms = on, settings, terms
        self.optimizer = torch.optim.AdamW(
            _groups(on.parameters, settings), weight_decay=settings.weight_decay
        )
        self.scaler = loss_scaler(settings.precision, on.task.device)
        self.gradients = Gradients(
            on.parameters, len(on.blocks), on.task.device, with_mean=with_mean_gradient
        )
        self.book = _Totals(len(on.blocks), self.gradients)
        self.meter = ActivationMeter(on.model)

    def recomputing(self) -> AbstractContextManager[None]:
        """In force while training with activation checkpointing."""
        if not self.settings.checkpointing:
            return nullcontext()
        return checkpointed(self.on.model, self.on.blocks, self.meter.note)

    def take(self, step: Step, active: Sequence[bool]) -> None:
        """Forward, backward, the method's own terms, clipping, and the optimizer's step."""
        on, trained = self.on, self.on.values
        with autocast(self.settings.precision, on.task.device), self.meter.measuring():
            loss, _ = on.task.loss_and_logits(on.model, step.batch)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norms = self.gradients.norms()
        if self.gradients.wants_mean and bool(torch.isfinite(total_norm(trained))):
            self.gradients.add()
        self.terms.add_gradients()
        _set_learning_rates(self.optimizer, step.rate_factor)
        clip_grads_with_norm_(trained, self.settings.clip_norm, total_norm(trained))
        moved = move(self.optimizer, self.scaler)
        self.optimizer.zero_grad(set_to_none=True)
        self.book.note(step.batch, loss, active, norms, moved)


def evaluate(
    model: nn.Module,
    table: TokenTable,
    rows: Rows,
    task: Classification,
    batch_size: int,
    precision: str = "fp32",
) -> Evaluation:
    """Measure the full model on rows of a table; leaves the model in evaluation mode."""
    start = time.perf_counter()
    model.eval()
    loss_sum, tokens, predicted, labels = 0.0, 0, [], []
    with torch.inference_mode():
        for chosen in ordered_batches(rows, table.lengths, batch_size):
            batch = task.collate(table, chosen)
            with autocast(precision, task.device):
                loss, logits = task.loss_and_logits(model, batch, reduction="sum")
            loss_sum += float(loss)
            tokens += batch["input_ids"].numel()
            predicted.append(logits.argmax(dim=-1).cpu().numpy())
            labels.append(table.labels[chosen])
    accuracy, f1 = accuracy_and_f1(
        np.concatenate(predicted), np.concatenate(labels), logits.shape[-1]
    )
    wall_s = time.perf_counter() - start
    return Evaluation(loss_sum / len(rows), accuracy, f1, len(rows), wall_s, tokens)


def training_batches(
    rows: Rows,
    table: TokenTable,
    batch_size: int,
    budget: Budget,
    rng: np.random.Generator,
) -> list[Rows]:
    """Rows of every step of a turn: batches of similar length, as many as the budget says.

    A turn shorter than an epoch takes a random part of the rows; a longer one starts another
    shuffled epoch.
    """
    if budget.epochs is not None:
        return [
            batch
            for _ in range(budget.epochs)
            for batch in grouped_batches(rows, table.lengths, batch_size, rng)
        ]
    steps = budget.steps or 0
    batches: list[Rows] = []
    while len(batches) < steps:
        part = rng.permutation(rows)[: (steps - len(batches)) * batch_size]
        batches += grouped_batches(part, table.lengths, batch_size, rng)
    return batches


def rate_factor(settings: LocalTraining, progress: float) -> float:
    """Part of the peak learning rates in force at a point of the run (0 start, 1 end).

    Linear warm-up, then the schedule.
    """
    if progress < settings.warmup_fraction:
        return progress / settings.warmup_fraction
    rest = (progress - settings.warmup_fraction) / (1 - settings.warmup_fraction)
    return SCHEDULES[settings.schedule](rest)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda rest: 1.0,
    "linear": lambda rest: 1.0 - rest,
    "cosine": lambda rest: 0.5 * (1.0 + math.cos(math.pi * rest)),
}
"""Part of the peak rate left, by the part of the run (after warm-up) that has passed."""


class _Totals:
    """Sums over the steps of a turn."""

    def __init__(self, num_layers: int, gradients: Gradients) -> None:
        self.losses: list[torch.Tensor] = []
        self.gradients = gradients
        self.active = np.zeros(num_layers, dtype=np.int64)
        self.layer_tokens = np.zeros(num_layers, dtype=np.int64)
        self.steps = self.examples = self.rows = self.tokens = 0

    def note(
        self,
        batch: Batch,
        loss: torch.Tensor,
        active: Sequence[bool],
        norms: torch.Tensor,
        moved: bool,
    ) -> None:
        ran = np.asarray(active, dtype=np.int64)
        self.steps += 1
        self.rows += len(batch["labels"])
        self.tokens += batch["input_ids"].numel()
        self.layer_tokens += batch["input_ids"].numel() * ran
        if moved:
            self.losses.append(loss.detach())
            self.gradients.note(norms)
            self.active += ran
            self.examples += len(batch["labels"])

    def outcome(self, peak_bytes: int, wall_s: float) -> TrainOutcome:
        losses = torch.stack(self.losses or [torch.tensor(math.nan)]).double()
        return TrainOutcome(
            steps=self.steps,
            examples=self.examples,
            tokens=self.tokens,
            rows=self.rows,
            layer_tokens=tuple(int(count) for count in self.layer_tokens),
            loss=float(losses.mean()),
            active_steps=tuple(int(count) for count in self.active),
            gradients=self.gradients.moments(self.active.tolist()),
            activation_bytes_peak=peak_bytes,
            wall_s=wall_s,
        )


def _groups(parameters: Parameters, settings: LocalTraining) -> list[dict[str, Any]]:
    """The map to the classes starts from nothing, the rest beside pretrained values: two rates."""
    output = _output_names(parameters)
    named = [pair for values in parameters.values() for pair in values.items()]
    rest = [value for name, value in named if name not in output]
    head = [value for name, value in named if name in output]
    groups = ((rest, settings.learning_rate), (head, settings.head_learning_rate))
    return [{"params": values, "lr": peak, "peak": peak} for values, peak in groups if values]


def _output_names(parameters: Parameters) -> set[str]:
    """The head's last linear map: ``out_proj`` in RoBERTa's head, else all but a pooler."""
    head = parameters.get(HEAD, {})
    last = {name for name in head if ".out_proj." in name}
    return last or {name for name in head if ".pooler." not in name}


def _set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
