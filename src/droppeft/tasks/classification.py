"""What a model is trained to do: batches, loss and metrics of text classification."""

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
    """One label per text or pair.

    Attributes:
        inputs: token columns that the model takes.
        pad_token_id: fills short rows.
        device: where batches go.
    """

    inputs: tuple[str, ...]
    pad_token_id: int
    device: torch.device

    def collate(self, table: TokenTable, rows: Rows) -> Batch:
        """Pad rows to the longest of them: (B, S) int64 columns, ``labels`` (B,)."""
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
        """Cross-entropy in fp32, and logits (B, C)."""
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
        logits: torch.Tensor = model(**inputs).logits.float()
        return functional.cross_entropy(logits, batch["labels"], reduction=reduction), logits


def accuracy_and_f1(predicted: Rows, labels: Rows, num_classes: int) -> tuple[float, float]:
    """Accuracy, and F1: of class 1 where the task has two classes, else the macro mean.

    The macro mean is over the classes that occur in either array.
    """
    average = "binary" if num_classes == 2 else "macro"
    f1 = f1_score(labels, predicted, average=average, zero_division=0.0)
    return float(np.mean(predicted == labels)), float(f1)
