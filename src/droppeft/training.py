"""Train adapters for some batches, and evaluate at full depth: one plain loop each.

The gate per mini-batch is stochastic transformer layer dropout (arXiv:2503.10217); the loop
around it is ours.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from droppeft.adapters.by_layer import Parameters
from droppeft.config import TrainingConfig
from droppeft.data.tables import Rows
from droppeft.data.tasks import Batch, Classification, accuracy_and_f1
from droppeft.data.tokens import TokenTable, grouped_batches, ordered_batches
from droppeft.layer_dropout import gated
from droppeft.plans import HEAD, Budget

ActiveAt = Callable[[int], Sequence[bool]]
"""Step within the turn -> which layers run."""


@dataclass(frozen=True)
class TrainOutcome:
    """What a turn of training did.

    Attributes:
        steps: optimizer steps.
        examples: rows seen, repeats counted.
        tokens: tokens computed, padding included.
        loss: mean over steps.
        active_steps: per layer, in how many steps it ran.
        importance: per layer, mean over its active steps of the norm of its adapter's gradient
            (of the task's loss, before clipping); 0 for a layer that never ran or has no adapter.
        activation_bytes_peak: see :func:`stored_activations`.
        wall_s: the steps alone.
    """

    steps: int
    examples: int
    tokens: int
    loss: float
    active_steps: tuple[int, ...]
    importance: tuple[float, ...]
    activation_bytes_peak: int
    wall_s: float


@dataclass(frozen=True)
class Evaluation:
    """Quality at full depth: mean loss, accuracy, F1, rows, and what measuring took."""

    loss: float
    accuracy: float
    f1: float
    rows: int
    wall_s: float


def train(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    parameters: Parameters,
    batches: Sequence[Batch],
    active_at: ActiveAt,
    rate_factors: Sequence[float],
    task: Classification,
    settings: TrainingConfig,
    proximal: float = 0.0,
) -> TrainOutcome:
    """Take one AdamW step per batch; layers that a step drops are left exactly as they were.

    A dropped layer has no gradient in that step (not a zero one), so that AdamW neither moves
    nor decays it. The optimizer starts afresh: nothing but the adapter outlives a turn.

    Args:
        blocks: the model's L layers, as :func:`droppeft.layer_dropout.find_blocks` gives them.
        parameters: what is trained, by layer.
        active_at: gate of each step.
        rate_factors: part of the peak learning rates in force, one per batch.
        proximal: FedProx's mu (arXiv:1812.06127), 0 for none.
    """
    trained = [value for named in parameters.values() for value in named.values()]
    anchors = [value.detach().clone() for value in trained] if proximal else []
    optimizer = torch.optim.AdamW(_groups(parameters, settings), weight_decay=settings.weight_decay)
    book = _Book(len(blocks))
    meter = ActivationMeter(model)
    model.train()
    start = time.perf_counter()
    with gated(blocks) as gates:
        for step, batch in enumerate(batches):
            gates.active = tuple(active_at(step))
            with meter.measuring(), autocast(settings.precision, task.device):
                loss, _ = task.loss_and_logits(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            norms = _gradient_norms(parameters, len(blocks), task.device)
            book.note(batch, loss, gates.active, norms)
            _pull_towards(anchors, trained, proximal)
            _set_learning_rates(optimizer, rate_factors[step])
            clip_grads_with_norm_(trained, settings.clip_norm, _total_norm(trained))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return book.outcome(meter.peak_bytes, time.perf_counter() - start)


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
    loss_sum, predicted, labels = 0.0, [], []
    with torch.inference_mode():
        for chosen in ordered_batches(rows, table.lengths, batch_size):
            batch = task.collate(table, chosen)
            with autocast(precision, task.device):
                loss, logits = task.loss_and_logits(model, batch, reduction="sum")
            loss_sum += float(loss)
            predicted.append(logits.argmax(dim=-1).cpu().numpy())
            labels.append(table.labels[chosen])
    accuracy, f1 = accuracy_and_f1(
        np.concatenate(predicted), np.concatenate(labels), logits.shape[-1]
    )
    wall_s = time.perf_counter() - start
    return Evaluation(loss_sum / len(rows), accuracy, f1, len(rows), wall_s)


def turn_batches(
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


def rate_factor(settings: TrainingConfig, progress: float) -> float:
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


def autocast(precision: str, device: torch.device) -> Any:
    """The forward's precision; adapters, gradients and optimizer stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class ActivationMeter:
    """Count what autograd stores for backward: exact, repeatable, the same on every device.

    Each storage counts once, whole, however many views of it are saved; the model's own
    parameters and buffers are no activations, but the copies of weights that bf16 autocast makes
    and keeps for backward do count. Under gradient checkpointing the recomputed block
    is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.peak_bytes = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the forward inside; :attr:`peak_bytes` keeps the largest."""
        stored: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        total = sum(size for place, size in stored.items() if place not in self._owned)
        self.peak_bytes = max(self.peak_bytes, total)


class _Book:
    """Sums over the steps of a turn."""

    def __init__(self, num_layers: int) -> None:
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.active = np.zeros(num_layers, dtype=np.int64)
        self.examples = self.tokens = 0

    def note(
        self, batch: Batch, loss: torch.Tensor, active: Sequence[bool], norms: torch.Tensor
    ) -> None:
        self.losses.append(loss.detach())
        self.norms.append(norms)
        self.active += np.asarray(active, dtype=np.int64)
        self.examples += len(batch["labels"])
        self.tokens += batch["input_ids"].numel()

    def outcome(self, peak_bytes: int, wall_s: float) -> TrainOutcome:
        norm_sums = torch.stack(self.norms).double().sum(dim=0).cpu().numpy()
        importance = norm_sums / np.maximum(self.active, 1)
        return TrainOutcome(
            steps=len(self.losses),
            examples=self.examples,
            tokens=self.tokens,
            loss=float(torch.stack(self.losses).double().mean()),
            active_steps=tuple(int(count) for count in self.active),
            importance=tuple(float(value) for value in importance),
            activation_bytes_peak=peak_bytes,
            wall_s=wall_s,
        )


def _gradient_norms(parameters: Parameters, num_layers: int, device: torch.device) -> torch.Tensor:
    """(L,) norms of the layers' adapter gradients; 0 where a layer has none in this step."""
    norms = [_total_norm(list(parameters.get(layer, {}).values())) for layer in range(num_layers)]
    # The norm of no gradients is a 0 on the CPU, wherever the others are.
    return torch.stack([norm.to(device) for norm in norms])


def _total_norm(values: Sequence[nn.Parameter]) -> torch.Tensor:
    gradients = [value.grad for value in values if value.grad is not None]
    return get_total_norm(gradients).detach()


def _pull_towards(
    anchors: Sequence[torch.Tensor], trained: Sequence[nn.Parameter], proximal: float
) -> None:
    """Add the gradient of (mu/2)·‖w − anchor‖² where the step has a gradient at all."""
    for anchor, value in zip(anchors, trained, strict=False):
        if value.grad is not None:
            value.grad.add_(value.detach() - anchor, alpha=proximal)


def _groups(parameters: Parameters, settings: TrainingConfig) -> list[dict[str, Any]]:
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
