"""The training loop and the evaluation loop.

Training drops layers in every step (stochastic transformer layer dropout, arXiv:2503.10217).
Evaluation runs all layers. The loops are ours.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from droppeft.adapters.by_layer import Parameters
from droppeft.adapters.training_mode import inputs_as_they_are, set_training_mode
from droppeft.cached_layers.cached_layers import CachedLayers
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenRows, grouped_batches, ordered_batches
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import gated
from droppeft.layer_dropout.modes import Mode
from droppeft.layer_dropout.module_attributes import own_layerdrop_off
from droppeft.messages.instruction import TASK_ALONE, Budget, LocalTraining, Objective
from droppeft.messages.tensors import Tensors
from droppeft.models.half_attention import fast_half_attention
from droppeft.models.key_value_cache import without_cache
from droppeft.models.precision import autocast, loss_scaler, optimizer_step
from droppeft.tasks.task import Batch, BatchResult, BoundTask, rows_of
from droppeft.training.activation_memory import ActivationMeter
from droppeft.training.checkpointing import checkpointed
from droppeft.training.deadline import Deadline
from droppeft.training.gradients import GradientMoments, Gradients, total_norm
from droppeft.training.learning_rates import parameter_groups, set_learning_rates
from droppeft.training.objectives import Terms


@dataclass(frozen=True)
class TrainOutcome:
    """What a local training did.

    A step that is skipped because fp16 overflowed changes nothing but has a cost. It counts in
    ``steps``, ``rows``, ``tokens``, ``layer_tokens``, ``forward_tokens``, ``activation_bytes_peak``
    and ``wall_s``, and nowhere else.

    Attributes:
        steps: number of batches; each is one optimizer step unless it is skipped.
        examples: rows trained on, repetitions counted.
        targets: predictions trained on: the same rows, or the tokens that they learn.
        tokens: tokens computed, padding included.
        rows: rows computed.
        layer_tokens: per layer, how many of the tokens it was trained on.
        forward_tokens: per layer, how many of the tokens it computed forward only.
        loss: mean loss over the steps; NaN if all were skipped.
        active_steps: per layer, the number of steps in which it was trained.
        gradients: moments of the gradients of the task's loss, by layer.
        activation_bytes_peak: see :class:`~droppeft.training.activation_memory.ActivationMeter`.
        wall_s: seconds of the steps alone.
    """

    steps: int
    examples: int
    targets: int
    tokens: int
    rows: int
    layer_tokens: tuple[int, ...]
    forward_tokens: tuple[int, ...]
    loss: float
    active_steps: tuple[int, ...]
    gradients: GradientMoments
    activation_bytes_peak: int
    wall_s: float

    @property
    def importance(self) -> tuple[float, ...]:
        """Per layer, the mean gradient norm over its active steps; 0 without a gradient."""
        return tuple(float(value) for value in self.gradients.norm)


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model with all layers, and what the evaluation took.

    Attributes:
        metrics: the value of each of the task's metrics.
        rows: number of rows.
        wall_s: seconds.
        tokens: tokens computed, padding included.
        batches: the rows of each batch, with its result.
    """

    metrics: Mapping[str, float]
    rows: int
    wall_s: float
    tokens: int
    batches: Sequence[tuple[Rows, BatchResult]] = field(default=(), repr=False, compare=False)

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.metrics["loss"]


@dataclass(frozen=True)
class Trainable:
    """A model, and which part of it is trained.

    Attributes:
        model: with adapters attached.
        blocks: its L layers, as :func:`droppeft.layer_dropout.find_blocks` gives them.
        parameters: the parameters that are trained, by layer.
        task: batches, loss and metrics.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    parameters: Parameters
    task: BoundTask

    @property
    def values(self) -> list[nn.Parameter]:
        """The parameters that are trained, in order."""
        return [value for named in self.parameters.values() for value in named.values()]


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        batches: the rows of the step, in parts that are computed one after another and whose
            gradients are added up; usually one.
        modes: what each of the L layers does.
        rate_factor: factor of the peak learning rates.
    """

    batches: Sequence[Batch]
    modes: Sequence[Mode]
    rate_factor: float


def train(
    on: Trainable,
    steps: Sequence[Step],
    settings: LocalTraining,
    objective: Objective = TASK_ALONE,
    cached: CachedLayers | None = None,
    anchors: Tensors | None = None,
    deadline: Deadline | None = None,
) -> TrainOutcome:
    """Take the optimizer steps (AdamW); a step does not change the layers that it does not train.

    A layer that a step does not train has no gradient, not a gradient of 0, so that AdamW applies
    neither momentum nor weight decay to it. The optimizer and, in fp16, the loss scale are created
    anew for each call, so that only the adapter carries over to the next local training. If fp16
    overflows, the step is skipped: it changes neither parameters nor momentum, but its batch, its
    modes and its place in the schedule are used up.

    Args:
        on: the model and its trained parameters.
        steps: the steps, in order.
        settings: learning rates, precision and further settings.
        objective: what is added to the task's loss.
        cached: replaces the frozen layers in every part of a step. Their modes say whether their
            states are computed in every step (``FORWARD``) or read (``CACHED``).
        anchors: see :class:`~droppeft.training.objectives.Terms`.
        deadline: checked before every step.

    Raises:
        Refused: the time is over.
    """
    loop = _Loop(on, settings, Terms(objective, on.parameters, anchors))
    set_training_mode(on.model, backbone_dropout=settings.backbone_dropout)
    start = time.perf_counter()
    with (
        computing_in(settings.precision, on.model, on.task.device),
        without_cache(on.model),
        own_layerdrop_off(on.model),
        loop.checkpointing(),
        gated(on.blocks) as gates,
    ):
        part = itertools.count()

        def begin(step: Step, batch: Batch) -> None:
            gates.modes = step.modes
            if cached is not None:
                cached.skip(gates, next(part), batch)

        for step in steps:
            if deadline is not None:
                deadline.check()
            loop.take(step, begin)
    if on.task.device.type == "cuda":
        torch.cuda.synchronize()  # so that the time includes the work that is still queued
    return loop.totals.outcome(loop.meter.peak_bytes, time.perf_counter() - start)


@contextmanager
def computing_in(precision: str, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Prepare a model for steps in a precision: no casts that autocast undoes, fast attention."""
    with inputs_as_they_are(model, precision), fast_half_attention(precision, device):
        yield


class _Loop:
    """What the steps of a local training share: optimizer, gradients, totals and memory meter."""

    def __init__(self, on: Trainable, settings: LocalTraining, terms: Terms) -> None:
        self.on, self.settings, self.terms = on, settings, terms
        self.optimizer = torch.optim.AdamW(
            parameter_groups(on.parameters, settings), weight_decay=settings.weight_decay
        )
        self.scaler = loss_scaler(settings.precision, on.task.device)
        self.gradients = Gradients(on.parameters, len(on.blocks), on.task.device)
        self.totals = _Totals(len(on.blocks), self.gradients)
        self.meter = ActivationMeter(on.model)

    def checkpointing(self) -> AbstractContextManager[None]:
        """Return the context of the training steps: gradient checkpointing, if it is set."""
        if not self.settings.checkpointing:
            return nullcontext()
        return checkpointed(self.on.model, self.on.blocks, self.meter.note)

    def take(self, step: Step, begin: Callable[[Step, Batch], None]) -> None:
        """Run forward, backward, the method's added terms, clipping, and the optimizer step.

        Args:
            begin: called before each forward.
        """
        on, trained = self.on, self.on.values
        targets = sum(map(on.task.targets, step.batches))
        losses = []
        for batch in step.batches:
            begin(step, batch)
            with autocast(self.settings.precision, on.task.device), self.meter.measuring():
                loss = on.task.loss(on.model, batch)
            if len(step.batches) > 1:
                loss = loss * (on.task.targets(batch) / targets)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        norms = self.gradients.norms()
        self.terms.add_gradients()
        set_learning_rates(self.optimizer, step.rate_factor)
        clip_grads_with_norm_(trained, self.settings.clip_norm, total_norm(trained))
        stepped = optimizer_step(self.optimizer, self.scaler)
        self.optimizer.zero_grad(set_to_none=True)
        self.totals.note(step, targets, torch.stack(losses).sum(), norms, stepped)


def evaluate(
    model: nn.Module,
    table: TokenRows,
    rows: Rows,
    task: BoundTask,
    batch_size: int,
    precision: str = "fp32",
) -> Evaluation:
    """Evaluate a model with all layers on rows of a table; leaves it in evaluation mode."""
    start = time.perf_counter()
    batches = ordered_batches(rows, table.lengths, batch_size)
    results, tokens = evaluate_batches(model, table, batches, task, precision)
    metrics, judged = task.metrics(results), tuple(zip(batches, results, strict=True))
    return Evaluation(metrics, len(rows), time.perf_counter() - start, tokens, judged)


def evaluate_batches(
    model: nn.Module,
    table: TokenRows,
    batches: Sequence[Rows],
    task: BoundTask,
    precision: str,
) -> tuple[list[BatchResult], int]:
    """Evaluate batches of rows; return their results, and the tokens computed with padding."""
    model.eval()
    tokens, results = 0, []
    with torch.inference_mode(), inputs_as_they_are(model, precision):
        for chosen in batches:
            batch = task.collate(table, chosen)
            with autocast(precision, task.device):
                results.append(task.evaluate(model, batch))
            tokens += batch["input_ids"].numel()
    return results, tokens


def training_batches(
    rows: Rows,
    table: TokenRows,
    batch_size: int,
    budget: Budget,
    rng: np.random.Generator,
) -> list[Rows]:
    """Return the rows of every step of a local training, as many batches as the budget says.

    Rows of a batch have similar lengths. If the budget is shorter than an epoch, a random part of
    the rows is used; if it is longer, further shuffled epochs follow.

    Raises:
        DroppeftError: a batch size below 1.
    """
    if batch_size < 1:
        raise DroppeftError(f"a batch of {batch_size} rows is not possible; it needs 1 or more")
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


class _Totals:
    """Sums over the steps of a local training."""

    def __init__(self, num_layers: int, gradients: Gradients) -> None:
        self.losses: list[torch.Tensor] = []
        self.gradients = gradients
        self.active = np.zeros(num_layers, dtype=np.int64)
        self.layer_tokens = np.zeros(num_layers, dtype=np.int64)
        self.forward_tokens = np.zeros(num_layers, dtype=np.int64)
        self.steps = self.examples = self.targets = self.rows = self.tokens = 0

    def note(
        self,
        step: Step,
        targets: int,
        loss: torch.Tensor,
        norms: torch.Tensor,
        stepped: bool,
    ) -> None:
        trained, forward = (
            np.array([mode is wanted for mode in step.modes], dtype=np.int64)
            for wanted in (Mode.TRAIN, Mode.FORWARD)
        )
        rows = sum(map(rows_of, step.batches))
        tokens = sum(batch["input_ids"].numel() for batch in step.batches)
        self.steps += 1
        self.rows += rows
        self.tokens += tokens
        self.layer_tokens += tokens * trained
        self.forward_tokens += tokens * forward
        if stepped:
            self.losses.append(loss)
            self.gradients.note(norms)
            self.active += trained
            self.examples += rows
            self.targets += targets

    def outcome(self, peak_bytes: int, wall_s: float) -> TrainOutcome:
        losses = torch.stack(self.losses or [torch.tensor(math.nan)]).double()
        return TrainOutcome(
            steps=self.steps,
            examples=self.examples,
            targets=self.targets,
            tokens=self.tokens,
            rows=self.rows,
            layer_tokens=tuple(int(count) for count in self.layer_tokens),
            forward_tokens=tuple(int(count) for count in self.forward_tokens),
            loss=float(losses.mean()),
            active_steps=tuple(int(count) for count in self.active),
            gradients=self.gradients.moments(self.active.tolist()),
            activation_bytes_peak=peak_bytes,
            wall_s=wall_s,
        )
