"""Reference accuracies without a language model: TF-IDF with a linear SVM, and majority classes.

Ours. They show how good an accuracy is compared with a bag-of-words model or a constant prediction.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from statistics import fmean

import numpy as np

from droppeft.data.cache import remembered
from droppeft.data.partition import ClientRows
from droppeft.data.texts import Rows, TextData, TextTable

_KNOWN: dict[str, float | None] = {}
"""Accuracy by content hash: runs of a comparison use the same data."""


def tfidf_accuracy(data: TextData) -> float | None:
    """Return the test accuracy of a linear SVM on TF-IDF of words and word pairs.

    It is trained on all training rows. The two texts of a pair are joined, so relations between
    them are lost. ``None`` if the texts have no words of two letters or more, as may be the case in
    scripts without spaces.
    """
    if data.content_hash not in _KNOWN:
        _KNOWN[data.content_hash] = _stored_accuracy(data)
    return _KNOWN[data.content_hash]


def _stored_accuracy(data: TextData) -> float | None:
    """The accuracy from the cache folder if it is known there, since fitting takes long."""
    key = f"{data.content_hash} {version('scikit-learn')}"

    def read(text: str) -> float | None:
        known = json.loads(text)
        return None if known is None else float(known)

    found: float | None = remembered(
        "references", key, lambda: _fitted_accuracy(data), json.dumps, read
    )
    return found


def _fitted_accuracy(data: TextData) -> float | None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LinearSVC(random_state=0)
    try:
        features = vectoriser.fit_transform(_joined(data.train))
    except ValueError:  # scikit-learn's error for an empty vocabulary
        return None
    model.fit(features, data.train.labels)
    predicted = model.predict(vectoriser.transform(_joined(data.test)))
    return float(np.mean(predicted == data.test.labels))


def majority_accuracy(data: TextData) -> float:
    """Return the test accuracy of always predicting the most frequent class of train."""
    return _constant_accuracy(data.train.labels, data.test.labels)


def own_majority_accuracy(data: TextData, clients: Sequence[ClientRows]) -> float:
    """Return the mean accuracy of predicting each client's most frequent training class.

    It is measured on each client's own test rows. A personal model has to exceed it, and it is high
    if clients have different label distributions.
    """
    labels = data.train.labels
    return fmean(_constant_accuracy(labels[rows.train], labels[rows.test]) for rows in clients)


def _constant_accuracy(train: Rows, test: Rows) -> float:
    return float(np.mean(test == np.argmax(np.bincount(train))))


def _joined(table: TextTable) -> list[str]:
    if table.pairs is None:
        return list(table.texts)
    return [f"{first} {second}" for first, second in zip(table.texts, table.pairs, strict=True)]
