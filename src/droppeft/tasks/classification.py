"""Classification of a text, or a pair of texts, into one of C classes. Ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from droppeft.config import Config
from droppeft.data.partition import ClientRows
from droppeft.data.reference import majority_accuracy, own_majority_accuracy, tfidf_accuracy
from droppeft.data.site_rows import SiteRows, SiteSource, read_site_texts
from droppeft.data.sources import load_test_texts, load_text
from droppeft.data.texts import Rows, TextData, TextTable
from droppeft.data.tokens import UNTRUNCATED, TokenRows, TokenTable, pad_batch, tokenise
from droppeft.models.loading import (
    HEAD_MODULES,
    LAST_MODULES,
    Backbone,
    BackboneConfig,
    load_backbone,
    load_backbone_config,
    load_dequantised,
)
from droppeft.models.precision import DTYPES, hold_in
from droppeft.tasks.metrics import ACCURACY, F1, LOSS, Metric
from droppeft.tasks.predictions import Predictions, joined
from droppeft.tasks.task import Batch, BatchResult, model_inputs, rows_of


@dataclass(frozen=True)
class Classification:
    """Classification with one model on one device.

    Attributes:
        inputs: names of the token columns that the model takes.
        pad_token_id: token that pads short rows.
        device: torch device of the batches.
    """

    inputs: tuple[str, ...]
    pad_token_id: int
    device: torch.device

    def collate(self, table: TokenTable, rows: Rows) -> Batch:
        """Return a batch of rows, padded to the longest: int64 columns (B, S), ``labels`` (B,)."""
        arrays = pad_batch(table, rows, self.pad_token_id)
        wanted = (*self.inputs, "attention_mask", "labels")
        return {
            name: torch.from_numpy(arrays[name]).to(self.device)
            for name in wanted
            if name in arrays
        }

    def logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the logits (B, C), in fp32."""
        inputs: dict[str, Any] = model_inputs(batch)
        logits: torch.Tensor = model(**inputs).logits.float()
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy of the rows, in fp32."""
        return functional.cross_entropy(self.logits(model, batch), batch["labels"])

    def targets(self, batch: Batch) -> int:
        """Return the number of rows."""
        return rows_of(batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> BatchResult:
        """Evaluate a batch; ``observed`` is the :class:`Predictions` of its rows."""
        logits, labels = self.logits(model, batch), batch["labels"]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        predicted = logits.argmax(dim=-1)
        probability = logits.softmax(dim=-1).gather(-1, predicted.unsqueeze(-1)).squeeze(-1)
        observed = Predictions(
            predicted.cpu().numpy(),
            labels.cpu().numpy(),
            probability.cpu().numpy(),
            classes=logits.shape[-1],
        )
        return BatchResult(float(loss), len(labels), observed)

    def losses_by_row(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of each row (B,), and 1 for each."""
        labels = batch["labels"]
        losses = functional.cross_entropy(self.logits(model, batch), labels, reduction="none")
        return losses, torch.ones_like(labels)

    def metrics(self, results: Sequence[BatchResult]) -> dict[str, float]:
        """Return accuracy, F1 and the mean cross-entropy."""
        found = joined([result.observed for result in results])
        accuracy, f1 = accuracy_and_f1(found.predicted, found.labels, found.classes)
        loss_sum = sum(result.loss_sum for result in results)
        return {"accuracy": accuracy, "f1": f1, "loss": loss_sum / len(found.labels)}

    def sample_batch(self, rows: int, length: int) -> Batch:
        """Return token columns (B, S) with an attention mask, as if padded, and labels (B,)."""
        names = [*self.inputs, "attention_mask"]
        column = torch.ones(rows, length, dtype=torch.int64, device=self.device)
        return {**{name: column.clone() for name in names}, "labels": column.new_zeros(rows)}


class ClassificationTask:
    """The task ``classification``; see :class:`~droppeft.tasks.task.Task`."""

    name = "classification"
    metrics: tuple[Metric, ...] = (ACCURACY, F1, LOSS)
    adapter_task = "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification
    heads: tuple[str, ...] = HEAD_MODULES
    calibration_rows = 256
    rows_are_targets = True
    generates = False

    def read(self, config: Config) -> TextData:
        """Read texts and labels; see :func:`~droppeft.data.sources.load_text`."""
        if config.partition.kind == "sites":
            return load_test_texts(config.data, config.source)
        return load_text(config.data, config.source, config.partition.key)

    def read_site(self, site: SiteSource, classes: Sequence[str] | None) -> SiteRows:
        """Read texts and labels of a site."""
        return read_site_texts(site, classes)

    def load_backbone(
        self,
        config: Config,
        label_names: Sequence[str],
        seed: int,
        *,
        dequantised: bool = False,
    ) -> Backbone:
        """Load a model with a head for these classes."""
        if dequantised and config.quantization != "none":
            return load_dequantised(config.model, label_names, seed, config.quantization)
        backbone = load_backbone(config.model, label_names, seed, config.quantization)
        trained = (*LAST_MODULES, *backbone.new_modules)
        hold_in(backbone.model, DTYPES[config.training.computed_in], trained)
        if dequantised:
            backbone.model.float()
        return backbone

    def load_backbone_config(self, name: str, label_names: Sequence[str]) -> BackboneConfig:
        """Load the configuration of a model with a head for these classes."""
        return load_backbone_config(name, label_names)

    def encode(self, table: TextTable, tokenizer: Any, config: Config) -> TokenTable:
        """Tokenise texts; see :func:`~droppeft.data.tokens.tokenise`."""
        return tokenise(table, tokenizer, config.training.max_length)

    def full_lengths(self, table: TextTable, tokenizer: Any, config: Config) -> Rows:
        """Return the number of tokens of each text, or pair of texts."""
        return tokenise(table, tokenizer, UNTRUNCATED).lengths

    def labelled(self, rows: TokenRows, classes: int, rng: np.random.Generator) -> TokenTable:
        """Return rows of tokens with random classes."""
        return TokenTable(rows.columns, rows.offsets, rng.integers(classes, size=len(rows)))

    def on(
        self, inputs: tuple[str, ...], pad_token_id: int, device: torch.device
    ) -> Classification:
        """Return the task for a model that takes these token columns."""
        return Classification(inputs, pad_token_id, device)

    def references(
        self, corpus: TextData, clients: Sequence[ClientRows]
    ) -> dict[str, float | None]:
        """Return the accuracies of majority classes, and of a linear SVM on TF-IDF features."""
        if not len(corpus.train):
            return {}
        return {
            "majority_accuracy": majority_accuracy(corpus),
            "own_majority_accuracy": own_majority_accuracy(corpus, clients),
            "tfidf_accuracy": tfidf_accuracy(corpus),
        }


def accuracy_and_f1(predicted: Rows, labels: Rows, num_classes: int) -> tuple[float, float]:
    """Return accuracy and F1.

    With two classes, F1 is that of class 1. Otherwise it is the mean over the classes that occur in
    either array (macro F1).
    """
    occurring = np.union1d(predicted, labels)
    judged = np.asarray([1]) if num_classes == 2 else occurring
    right = np.asarray([np.sum((predicted == one) & (labels == one)) for one in judged])
    either = np.asarray([np.sum(predicted == one) + np.sum(labels == one) for one in judged])
    f1 = np.mean(2.0 * right / np.maximum(either, 1))
    return float(np.mean(predicted == labels)), float(f1)
