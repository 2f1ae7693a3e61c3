"""A model with LoRA, texts that it is trained on, and other texts to compute gradients of."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.gradient_fidelity.layers import Layers, Mode, Modes, observing, with_modes
from benchmarks.speed.measuring import data_file
from benchmarks.speed.our_training import our_training
from droppeft.adapters.by_layer import set_tensors
from droppeft.costs.fake_step import FakeModel, count_step
from droppeft.costs.step_counts import StepCounts
from droppeft.layer_dropout.module_attributes import own_layerdrop_off
from droppeft.messages.instruction import Budget
from droppeft.messages.tensors import HEAD
from droppeft.models.key_value_cache import without_cache
from droppeft.models.precision import autocast
from droppeft.tasks.task import Batch
from droppeft.training.loop import computing_in, training_batches

SETTINGS = (
    *("training.precision=bf16", "training.schedule=constant"),
    *("training.head_learning_rate=0.01", "training.weight_decay=0.01", "seed=0"),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        full: batches at full depth, whose mean stands for the expected gradient.
        batches: the first of them, on which candidates are measured.
        draws: of the layers, for each of these batches.
        calibration: further batches.
        steps: of the training between the two measurements.
    """

    full: int = 16
    batches: int = 8
    draws: int = 2
    calibration: int = 2
    steps: int = 100


@dataclass(frozen=True)
class Subject:
    """A model, the texts that it learns, the rows of a step, and how much is measured."""

    data: str
    batch_size: int
    words: tuple[str, ...]
    sizes: Sizes = Sizes()


SUBJECTS = {
    "mpnet": Subject(
        "ag_news", 16, ("model=mpnet", "adapter.targets=q,v", "training.max_length=64")
    ),
    "smollm2": Subject(
        "e2e_nlg",
        6,
        (
            *("model=smollm2", "task=causal_lm", "training.max_length=128"),
            *("source.train=validation", "source.test=test"),
        ),
        Sizes(full=10, batches=5, calibration=1),
    ),
}


@dataclass(frozen=True)
class Gradient:
    """Gradients of a batch: of the adapters' values (P,), and of the head's (Q,)."""

    adapters: torch.Tensor
    head: torch.Tensor


class Stand:
    """A model with LoRA, and its texts.

    Attributes:
        batches: of texts that it is not trained on, for gradients.
        calibration: further batches of such texts.
        length: mean length of a batch, padding included.
        counts: FLOPs of a step of this length.
    """

    def __init__(self, subject: Subject, sizes: Sizes) -> None:
        number = sizes.full + sizes.calibration
        rows = (f"source.max_test_rows={number * subject.batch_size}", "evaluation.rows=16")
        words = (*SETTINGS, *subject.words, f"data={data_file(subject.data)}", *rows)
        self.training = our_training(words, sizes.steps, subject.batch_size)
        self.model = self.training.client.model
        self.model.attach(self.training.instruction.adapter)
        self.precision = self.training.instruction.training.precision
        table, rng = self.training.prepared.test, np.random.default_rng(0)
        chosen = training_batches(
            np.arange(len(table)), table, subject.batch_size, Budget(steps=number), rng
        )
        made = [self.model.task.collate(table, rows) for rows in chosen]
        self.batches, self.calibration = made[: sizes.full], made[sizes.full :]
        self.length = round(fmean(batch["input_ids"].shape[1] for batch in self.batches))
        self.counts = self._counts(subject.batch_size)

    def set_initial_values(self) -> None:
        """Give adapters and head the values with which a training begins."""
        fresh = self.model.fresh_tensors(self.training.instruction.adapter)
        set_tensors(self.model.parameters, fresh)

    def train(self) -> float:
        """Train at full depth from the initial values; return the mean loss of the steps."""
        return self.training.train().train_loss

    @contextmanager
    def computing(self) -> Iterator[Layers]:
        """Prepare the model for losses and gradients inside, without dropout modules."""
        model, device = self.model.model, self.model.device
        model.eval()
        with (
            computing_in(self.precision, model, device),
            without_cache(model),
            own_layerdrop_off(model),
            with_modes(self.model.blocks) as layers,
        ):
            yield layers

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch; call it inside of :meth:`computing`."""
        with autocast(self.precision, self.model.device):
            return self.model.task.loss(self.model.model, batch)

    def gradient(self, batch: Batch) -> tuple[float, Gradient]:
        """The loss of a batch and its gradients; values without one have 0."""
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        adapters, head = [], [torch.zeros(0)]
        for key, named in self.model.parameters.items():
            for value in named.values():
                found = torch.zeros_like(value) if value.grad is None else value.grad
                (head if key == HEAD else adapters).append(found.flatten())
        self.model.model.zero_grad(set_to_none=True)
        return float(loss.detach()), Gradient(torch.cat(adapters), torch.cat(head))

    def trained(self, modes: Modes) -> torch.Tensor:
        """Which adapter values belong to trained layers: (P,), 1 or 0."""
        parts = [
            torch.full((value.numel(),), float(modes[key] is Mode.TRAIN))
            for key, named in self.model.parameters.items()
            if isinstance(key, int)
            for value in named.values()
        ]
        return torch.cat(parts)

    def calibrate(self, layers: Layers) -> tuple[list[float], list[torch.Tensor]]:
        """By layer, the loss that is added when it alone is skipped, and the mean of what it adds.

        Call it inside of :meth:`computing`.
        """
        blocks, tokens, full, added = self.model.blocks, 0, [], []
        sums = [torch.zeros(()) for _ in blocks]
        with torch.no_grad():
            for batch in self.calibration:
                with observing(blocks, batch["attention_mask"]) as observed:
                    full.append(float(self.loss(batch)))
                sums = [one + more for one, more in zip(sums, observed, strict=True)]
                tokens += int(batch["attention_mask"].sum())
            for skipped in range(len(blocks)):
                layers.modes = tuple(
                    Mode.SKIP if layer == skipped else Mode.TRAIN for layer in range(len(blocks))
                )
                losses = [float(self.loss(batch)) for batch in self.calibration]
                added.append(fmean(losses) - fmean(full))
        layers.modes = layers.all_trained
        return added, [one / tokens for one in sums]

    def _counts(self, rows: int) -> StepCounts:
        config, backbone = self.training.prepared.config, self.training.prepared.loaded.backbone
        spec, model = self.training.instruction.adapter, backbone.model
        of: Any = model.config
        return count_step(FakeModel(of, config.task, spec, backbone.new_modules), rows, self.length)
