from pathlib import Path

import numpy as np
import pytest

from droppeft.config import SourceConfig
from droppeft.data import reference
from droppeft.data.partition import ClientRows
from droppeft.data.reference import majority_accuracy, own_majority_accuracy, tfidf_accuracy
from droppeft.data.sources import load_text
from droppeft.data.texts import TextData, TextTable


def _task(train: TextTable, test: TextTable) -> TextData:
    return TextData("task", train, test, ("no", "yes"))


def test_a_word_that_identifies_the_class_is_learned() -> None:
    texts = ("good film", "bad film", "good play", "bad play")
    train = TextTable(texts, None, np.array([1, 0, 1, 0]))
    test = TextTable(("good song", "bad song", "song bad"), None, np.array([1, 0, 1]))
    assert tfidf_accuracy(_task(train, test)) == pytest.approx(2 / 3)  # the last label is wrong


def test_the_second_text_of_a_pair_is_used() -> None:
    train = TextTable(("film",) * 4, ("good", "bad", "good", "bad"), np.array([1, 0, 1, 0]))
    test = TextTable(("film", "film"), ("good", "bad"), np.array([1, 0]))
    assert tfidf_accuracy(_task(train, test)) == 1


def test_the_majority_class_is_that_of_train() -> None:
    train = TextTable(("a", "b", "c"), None, np.array([1, 1, 0]))
    test = TextTable(("a", "b", "c", "d"), None, np.array([0, 0, 0, 1]))
    assert majority_accuracy(_task(train, test)) == 1 / 4


def test_a_client_s_own_majority_is_of_its_training_rows() -> None:
    """By hand: client 0 predicts 1, correct once in three; client 1 predicts 0, always correct."""
    train = TextTable(tuple("abcdefghijk"), None, np.array([1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 0]))
    clients = (
        ClientRows(np.array([0, 1, 2]), np.array([10]), np.array([3, 4, 5])),
        ClientRows(np.array([6, 7, 8]), np.array([9]), np.array([10])),
    )
    assert own_majority_accuracy(_task(train, train), clients) == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize(
    ("name", "tfidf", "majority"), [("cola", 0.68, 0.691), ("mrpc", 0.69, 0.665)]
)
def test_real_data(data_folder: Path, name: str, tfidf: float, majority: float) -> None:
    data = load_text(str(data_folder / name), SourceConfig())
    assert tfidf_accuracy(data) == pytest.approx(tfidf, abs=0.02)
    assert majority_accuracy(data) == pytest.approx(majority, abs=0.001)


def test_texts_without_words_have_no_reference() -> None:
    table = TextTable(("好", "坏"), None, np.array([1, 0]))
    assert tfidf_accuracy(_task(table, table)) is None


def test_the_same_data_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[TextData] = []

    def fit(data: TextData) -> float:
        fitted.append(data)
        return len(fitted) / 10

    monkeypatch.setattr(reference, "_fitted_accuracy", fit)
    monkeypatch.setattr(reference, "_KNOWN", {})
    table = TextTable(("good", "bad"), None, np.array([1, 0]))
    other = TextTable(("good", "bad"), None, np.array([0, 1]))
    tasks = [_task(table, table), _task(table, table), _task(table, other), _task(table, table)]
    assert [tfidf_accuracy(data) for data in tasks] == [0.1, 0.1, 0.2, 0.1]
