"""The confusion matrix of the delivered classifier, and its most confident mistakes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from droppeft.client.global_model import attached
from droppeft.config import load_config
from droppeft.methods.rules import check_settings
from droppeft.server.global_evaluation import evaluate_global
from droppeft.server.predicted_classes import predicted_classes
from droppeft.server.prepare import Prepared
from droppeft.tasks.classification import Classification
from droppeft.tasks.predictions import confused_sentence, most_confused, scores_by_class
from refusals import refused
from runs import rows_of

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def direct_probabilities(prepared: Prepared) -> Array:
    """The probability of each class for each test row, which is computed alone."""
    task = prepared.model.task
    assert isinstance(task, Classification)
    with attached(prepared.model, prepared.state.model) as model, torch.inference_mode():
        model.eval()
        found = [
            task.logits(model, task.collate(prepared.test, np.array([row]))).softmax(dim=-1)
            for row in range(len(prepared.test))
        ]
    return torch.cat(found).double().numpy()


def test_counts_and_mistakes_are_those_of_a_direct_count(
    prepare_with: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared = prepare_with("evaluation.mistakes=5", "evaluation.batch_size=7")
    expected = direct_probabilities(prepared)
    labels, predicted = prepared.loaded.data.test.labels, expected.argmax(axis=1)
    every = np.arange(len(labels), dtype=np.int64)
    evaluation = evaluate_global(prepared, prepared.state.model, every)

    found = predicted_classes(prepared, evaluation, tmp_path)
    assert found["class_names"] == ["food", "music", "space"]
    assert found["confusion"] == confusion_matrix(labels, predicted, labels=[0, 1, 2]).tolist()

    kept = rows_of(tmp_path / "mistakes.jsonl")
    wrong = np.flatnonzero(labels != predicted)
    order = wrong[np.argsort(-expected[wrong].max(axis=1))][:5]
    assert len(kept) == 5 < len(wrong)
    np.testing.assert_allclose(
        [one["probability"] for one in kept], expected[order].max(axis=1), rtol=1e-5
    )
    names, table = found["class_names"], prepared.loaded.data.test
    for one in kept:
        row = table.texts.index(one["text"])
        assert one["true"] == names[labels[row]] != one["predicted"] == names[predicted[row]]


def test_the_second_text_of_a_pair_is_kept_and_nothing_by_default(
    prepare_with: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared = prepare_with("evaluation.mistakes=1")
    data = prepared.loaded.data
    second = tuple(f"second {row}" for row in range(len(data.test)))
    pairs = replace(data, test=replace(data.test, pairs=second))
    evaluation = evaluate_global(prepared, prepared.state.model, prepared.sample)
    predicted_classes(
        replace(prepared, loaded=replace(prepared.loaded, data=pairs)), evaluation, tmp_path
    )
    [one] = rows_of(tmp_path / "mistakes.jsonl")
    assert one["pair"] == second[data.test.texts.index(one["text"])]
    (tmp_path / "mistakes.jsonl").unlink()
    predicted_classes(prepare_with(), evaluation, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("task=causal_lm", "task=causal_lm; leave it out"),
        ("method=fedsa_lora", "method=fedsa_lora, which gives no global model"),
    ],
)
def test_mistakes_are_refused_where_there_are_none(setting: str, reason: str) -> None:
    with refused(f"evaluation.mistakes has no effect with {reason}"):
        check_settings(load_config(None, [setting, "evaluation.mistakes=1"]))


COUNTS = [[5, 3, 0, 0], [1, 4, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
"""Of class 2 nothing is predicted; class 3 does not occur."""


def test_scores_are_those_of_scikit_learn() -> None:
    pairs = [(true, guess) for true in range(4) for guess in range(4)]
    repeated = [pair for pair in pairs for _ in range(COUNTS[pair[0]][pair[1]])]
    labels, predicted = zip(*repeated, strict=True)
    expected = precision_recall_fscore_support(
        labels, predicted, labels=range(4), zero_division=np.nan
    )
    for scores, *theirs in zip(scores_by_class(COUNTS), *expected, strict=True):
        ours = (scores.precision, scores.recall, scores.f1)
        assert [np.nan if one is None else one for one in ours] == pytest.approx(
            theirs[:3], nan_ok=True
        )
        assert scores.rows == theirs[3]


def test_the_most_confused_classes_are_named() -> None:
    pairs = [(one.true, one.predicted, one.rows, one.of) for one in most_confused(COUNTS, 2)]
    assert pairs == [(0, 1, 3, 8), (2, 1, 2, 2)]
    assert len(most_confused(COUNTS, 9)) == 3
    assert confused_sentence(COUNTS, "abcd") == (
        "Most often confused: 3 of the 8 test texts of class a are taken for b."
    )
    assert confused_sentence([[1, 2], [3, 4]], "ab") is None
    assert confused_sentence([[1, 0, 0], [0, 1, 0], [0, 0, 1]], "abc") is None
