from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import nn

from droppeft.data.tokens import TokenTable
from droppeft.tasks.classification import Classification, accuracy_and_f1

CPU = torch.device("cpu")
TABLE = TokenTable(
    columns={
        "input_ids": np.array([5, 6, 7, 8, 9, 3], dtype=np.int32),
        "token_type_ids": np.array([0, 1, 1, 0, 0, 1], dtype=np.int32),
    },
    offsets=np.array([0, 3, 5, 6]),
    labels=np.array([2, 0, 1]),
)


class FixedLogits(nn.Module):
    """Returns given logits, in bf16 as a model under autocast does."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> SimpleNamespace:
        self.seen = inputs
        return SimpleNamespace(logits=self.logits)


def test_a_batch_is_padded_to_its_longest_row() -> None:
    task = Classification(("input_ids", "token_type_ids"), 99, CPU)
    batch = task.collate(TABLE, np.array([2, 0]))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[3, 99, 99], [5, 6, 7]],
        "token_type_ids": [[1, 0, 0], [0, 1, 1]],
        "attention_mask": [[1, 0, 0], [1, 1, 1]],
        "labels": [1, 2],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_batch_has_only_what_the_model_takes() -> None:
    batch = Classification(("input_ids",), 0, CPU).collate(TABLE, np.array([1]))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    # For a column that the tokenizer did not return, the model uses its default.
    batch = Classification(("input_ids", "position_ids"), 0, CPU).collate(TABLE, np.array([1]))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


def test_a_batch_goes_to_the_device() -> None:
    batch = Classification(("input_ids",), 0, torch.device("meta")).collate(TABLE, np.array([1]))
    assert {value.device.type for value in batch.values()} == {"meta"}


def test_the_loss_is_the_cross_entropy_in_full_precision() -> None:
    model_logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]).bfloat16()
    model = FixedLogits(model_logits)
    batch = Classification(("input_ids",), 0, CPU).collate(TABLE, np.array([0, 1]))
    task = Classification(("input_ids",), 0, CPU)
    loss, evaluated = task.loss(model, batch), task.evaluate(model, batch)
    assert model.seen.keys() == {"input_ids", "attention_mask"}  # labels would cost a second loss
    assert torch.equal(task.logits(model, batch), model_logits.float())
    # -log softmax at the labels 2 and 0, written out.
    rows = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    each = np.log(np.exp(rows).sum(axis=1)) - rows[[0, 1], [2, 0]]
    assert (loss.dtype, float(loss)) == (torch.float32, pytest.approx(each.mean(), rel=1e-6))
    assert (evaluated.loss_sum, evaluated.targets) == (pytest.approx(each.sum(), rel=1e-6), 2)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1))
def test_two_classes_give_the_f1_of_the_second(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs).T
    accuracy, f1 = accuracy_and_f1(predicted, labels, 2)
    hits = sum(p == label == 1 for p, label in pairs)
    involved = predicted.sum() + labels.sum()
    assert accuracy == pytest.approx(sum(p == label for p, label in pairs) / len(pairs))
    assert f1 == pytest.approx(2 * hits / involved if involved else 0.0)
    assert f1 == pytest.approx(f1_score(labels, predicted, zero_division=0.0))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_more_classes_give_the_mean_f1(pairs: list[tuple[int, int]]) -> None:
    """Also where only the first two occur among the labels, as on a client with few classes."""
    predicted, labels = np.array(pairs).T
    each = [
        2 * sum(p == label == k for p, label in pairs) / (list(predicted) + list(labels)).count(k)
        for k in sorted({*predicted, *labels})
    ]
    accuracy, f1 = accuracy_and_f1(predicted, labels, 4)
    assert accuracy == pytest.approx(np.mean(predicted == labels))
    assert f1 == pytest.approx(np.mean(each))
    assert f1 == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0.0))


def test_a_skewed_sample_of_many_classes_has_an_f1() -> None:
    # Class 0: 1, class 1: 2·1/(1+2), class 3 (only predicted): 0.
    accuracy, f1 = accuracy_and_f1(np.array([0, 3, 1]), np.array([0, 1, 1]), 4)
    assert (accuracy, f1) == (pytest.approx(2 / 3), pytest.approx((1 + 2 / 3 + 0) / 3))
