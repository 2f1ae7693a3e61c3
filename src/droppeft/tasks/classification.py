"""Text classification: batches, loss and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.nn import functional

from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenTable, pad_batch

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Classification:
    """Classification of a text or a pair of texts into one of C classes.

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

    def loss_and_logits(
        self, model: nn.Module, batch: Batch, reduction: str = "mean"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy in fp32, and the logits (B, C)."""
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
        logits: torch.Tensor = model(**inputs).logits.float()
        return functional.cross_entropy(logits, batch["labels"], reduction=reduction), logits


def accuracy_and_f1(predicted: Rows, labels: Rows, num_classes: int) -> tuple[float, float]:
    """Return accuracy and F1.

    With two classes, F1 is that of class 1. Otherwise it is the mean over the classes that occur in
    either array (macro F1).
    """
    average = "binary" if num_classes == 2 else "macro"
    f1 = f1_score(labels, predicted, average=average, zero_division=0.0)
    return float(np.mean(predicted == labels)), float(f1)
