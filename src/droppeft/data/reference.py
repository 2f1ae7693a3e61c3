"""What a task is worth without a language model: TF-IDF with a linear SVM, and majority classes.

Ours; the usual bag-of-words baseline and constant answers, so that an accuracy can be judged.
"""

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from droppeft.data.partition import ClientRows
from droppeft.data.texts import Rows, TextData, TextTable

_KNOWN: dict[str, float | None] = {}
"""By content: every run of a comparison asks for the same data, and fitting takes many seconds."""


def tfidf_accuracy(data: TextData) -> float | None:
    """Test accuracy of a linear SVM on TF-IDF of words and word pairs, trained on all of train.

    ``None`` where the texts have no words of two letters or more, as in writing without spaces.

    The two texts of a pair are joined, so this sees no relation between them.
    """
    if data.content_hash not in _KNOWN:
        _KNOWN[data.content_hash] = _fitted_accuracy(data)
    return _KNOWN[data.content_hash]


def _fitted_accuracy(data: TextData) -> float | None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LinearSVC(random_state=0)
    try:
        features = vectoriser.fit_transform(_joined(data.train))
    except ValueError:  # what scikit-learn raises for an empty vocabulary
        return None
    model.fit(features, data.train.labels)
    predicted = model.predict(vectoriser.transform(_joined(data.test)))
    return float(np.mean(predicted == data.test.labels))


def majority_accuracy(data: TextData) -> float:
    """Test accuracy of always answering train's most frequent class."""
    return _constant_accuracy(data.train.labels, data.test.labels)


def own_majority_accuracy(data: TextData, clients: Sequence[ClientRows]) -> float:
    """Mean over clients of always answering the most frequent class of the client's training rows.

    On its own test rows: what a personal model has to beat, which is much where clients are unlike.
    """
    labels = data.train.labels
    return fmean(_constant_accuracy(labels[own.train], labels[own.test]) for own in clients)


def _constant_accuracy(train: Rows, test: Rows) -> float:
    return float(np.mean(test == np.argmax(np.bincount(train))))


def _joined(table: TextTable) -> list[str]:
    if table.pairs is None:
        return list(table.texts)
    return [f"{first} {second}" for first, second in zip(table.texts, table.pairs, strict=True)]
