"""What a task is: how data are read and learnt from, and how quality is measured. Ours.

The round loop, the methods, the clients and the reports know no labels and no tokens. What is
particular to a kind of learning is in one :class:`Task`; :mod:`droppeft.tasks.registry` lists them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from droppeft.config import Config
from droppeft.data.findings import Findings
from droppeft.data.partition import ClientRows
from droppeft.data.site_rows import SiteRows, SiteSource
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenRows
from droppeft.models.loading import Backbone, BackboneConfig
from droppeft.tasks.metrics import Metric

Batch = Mapping[str, torch.Tensor]
"""Token columns and ``attention_mask`` of shape (B, S), and what is learnt from them."""

LEARNT = frozenset({"labels", "positions"})
"""Entries of a batch that are no inputs of the model."""


class Table(Protocol):
    """The rows of one split."""

    @property
    def labels(self) -> Rows:
        """The label of each row, shape (rows,), by which rows can be partitioned."""

    @property
    def keys(self) -> Sequence[str] | None:
        """The owner of each row, if owners were asked for."""

    def __len__(self) -> int: ...


class Corpus(Protocol):
    """The data of a run."""

    @property
    def train(self) -> Any:
        """The rows that are partitioned among the clients, a :class:`Table`."""

    @property
    def test(self) -> Any:
        """The rows on which the server evaluates the global model, a :class:`Table`."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of each label."""

    @property
    def findings(self) -> Findings:
        """What reading found and did."""

    @property
    def content_hash(self) -> str:
        """Hash of everything that is learnt from: 16 hexadecimal digits."""


@dataclass(frozen=True)
class BatchResult:
    """The evaluation of one batch.

    Attributes:
        loss_sum: sum of the losses of its targets.
        targets: number of predictions that are judged: rows, or tokens of completions.
        observed: what the task's metrics need besides.
    """

    loss_sum: float
    targets: int
    observed: Any


class BoundTask(Protocol):
    """A task for one model on one device: batches, loss and metrics."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the token columns that the model takes."""

    @property
    def device(self) -> torch.device:
        """The device of the batches."""

    def collate(self, table: Any, rows: Rows) -> Batch:
        """Return a batch of rows, padded to the longest."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of the batch's targets, in fp32."""

    def targets(self, batch: Batch) -> int:
        """Return the number of predictions that a batch trains: rows, or tokens."""

    def evaluate(self, model: nn.Module, batch: Batch) -> BatchResult:
        """Evaluate a batch; the model is in evaluation mode."""

    def losses_by_row(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each row, summed over its targets, and their number; both (B,)."""

    def metrics(self, results: Sequence[BatchResult]) -> dict[str, float]:
        """Return the value of each of the task's metrics over several batches."""

    def sample_batch(self, rows: int, length: int) -> Batch:
        """Return a batch as :meth:`collate` makes it, without data, for counting operations."""


class Task(Protocol):
    """A kind of learning.

    Attributes:
        name: the value of the setting ``task``.
        metrics: measures of quality. The first one is primary: it is shown in every round and is
            what a target refers to.
        adapter_task: peft's name for the task.
        auto_class: class of transformers that loads such a model.
        heads: names of modules between the last layer and the output, which are not quantised.
        calibration_rows: number of rows on which layers are measured, unless there are fewer.
        rows_are_targets: whether each row is one target. Otherwise the targets are tokens.
        generates: whether the model writes texts.
    """

    name: str
    metrics: tuple[Metric, ...]
    adapter_task: str
    auto_class: Any
    heads: tuple[str, ...]
    calibration_rows: int
    rows_are_targets: bool
    generates: bool

    def read(self, config: Config) -> Corpus:
        """Read the data that a configuration names; of a server of sites, the test rows alone.

        Raises:
            DroppeftError: they cannot be read or do not fit the task.
        """

    def read_site(self, site: SiteSource, classes: Sequence[str] | None) -> SiteRows:
        """Read the rows of a site.

        Args:
            site: where they are.
            classes: names of the task's classes in their order, if it has classes; ``None`` takes
                those of the rows.

        Raises:
            DroppeftError: they cannot be read or do not fit the task.
        """

    def load_backbone(
        self,
        config: Config,
        label_names: Sequence[str],
        seed: int,
        *,
        dequantised: bool = False,
    ) -> Backbone:
        """Load the model that a configuration names.

        Args:
            config: of the run.
            label_names: of the data.
            seed: of initial values.
            dequantised: whether weights that are quantised, or in half precision, are replaced
                by their values in fp32.

        Raises:
            DroppeftError: the model is unknown, unreadable or unsupported.
        """

    def load_backbone_config(self, name: str, label_names: Sequence[str]) -> BackboneConfig:
        """Load a model's configuration, without weights or tokenizer.

        Raises:
            DroppeftError: the model is unknown, unreadable or unsupported.
        """

    def encode(self, table: Any, tokenizer: Any, config: Config) -> TokenRows:
        """Tokenise the rows of a table."""

    def full_lengths(self, table: Any, tokenizer: Any, config: Config) -> Rows:
        """Return the number of tokens of each row before truncation, shape (rows,)."""

    def labelled(self, rows: TokenRows, classes: int, rng: np.random.Generator) -> TokenRows:
        """Return rows of random tokens as :meth:`encode` does, to measure steps without data.

        Args:
            rows: the tokens.
            classes: number of classes, for a classifier.
            rng: generator of random labels.
        """

    def on(self, inputs: tuple[str, ...], pad_token_id: int, device: torch.device) -> BoundTask:
        """Return the task for a model that takes these token columns."""

    def references(self, corpus: Any, clients: Sequence[ClientRows]) -> dict[str, float | None]:
        """Return values of the primary metric to compare with, by their names in results.

        There are none without training rows.
        """


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the entries of a batch that the model takes."""
    return {name: value for name, value in batch.items() if name not in LEARNT}


def rows_of(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    return len(batch["input_ids"])
