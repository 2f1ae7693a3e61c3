import re
from pathlib import Path

import numpy as np
import pytest

from droppeft.config import SourceConfig
from droppeft.data.builtin import EXPECTED_HASH, LIBRARIES, TEXTS, load_builtin
from droppeft.data.reference import majority_accuracy, tfidf_accuracy
from droppeft.data.sources import load_text
from droppeft.data.texts import TextData
from droppeft.errors import DroppeftError


@pytest.fixture(scope="module")
def data() -> TextData:
    return load_builtin()


def test_the_file_holds_the_recorded_texts(data: TextData) -> None:
    assert data.content_hash == EXPECTED_HASH
    assert f"`{EXPECTED_HASH}`" in (TEXTS.parent / "NOTICE.md").read_text(encoding="utf-8")


def test_every_library_has_as_many_rows_in_each_part(data: TextData) -> None:
    assert data.label_names == LIBRARIES
    assert np.bincount(data.train.labels).tolist() == [500] * 8
    assert np.bincount(data.test.labels).tolist() == [125] * 8


def test_labels_name_the_library_of_the_file(data: TextData) -> None:
    for table in (data.train, data.test):
        names = [data.label_names[label] for label in table.labels]
        assert names == [file.split("/")[0] for file in table.keys or ()]


def test_no_source_file_is_in_both_parts(data: TextData) -> None:
    assert not set(data.train.keys or ()) & set(data.test.keys or ())


def test_texts_are_prose_on_one_line_without_the_library(data: TextData) -> None:
    names = re.compile("|".join([*LIBRARIES, "numpy", "scikit"]), re.IGNORECASE)
    for text in data.train.texts + data.test.texts:
        assert not names.search(text)
        assert len(re.findall(r"[A-Za-z]{2,}", text)) >= 8
        assert text == " ".join(text.split())
        assert not text.startswith(">>>")


def test_the_task_is_neither_trivial_nor_impossible(data: TextData) -> None:
    assert majority_accuracy(data) == 1 / len(LIBRARIES)
    assert 0.5 < tfidf_accuracy(data) < 0.8


def test_every_library_has_its_licence_beside_the_texts() -> None:
    notice = (TEXTS.parent / "NOTICE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| .*\]\((licences/[\w.-]+)\) \|$", notice, re.MULTILINE)
    assert [library for library, _ in rows] == list(LIBRARIES)
    for _, path in rows:
        text = (TEXTS.parent / path).read_text(encoding="utf-8")
        assert re.search("distribut", text, re.IGNORECASE)
        assert re.search(r"copyright", text, re.IGNORECASE)


def test_load_text_returns_the_builtin_data_and_its_owners(data: TextData) -> None:
    plain = load_text("builtin", SourceConfig())
    assert plain.content_hash == data.content_hash
    assert plain.train.keys is None
    owned = load_text("builtin", SourceConfig(max_train_rows=40), key="package")
    assert len(owned.train) == 40
    assert all(re.fullmatch(r"\w+/[\w.]+", owner) for owner in owned.train.keys or ("none",))
    assert owned.test.keys is None


def test_loading_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DROPPEFT_CACHE", str(tmp_path / "cache"))
    load_text("builtin", SourceConfig())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "key", "message"),
    [
        (SourceConfig(label="label"), None, "source.label does not apply to data=builtin"),
        (SourceConfig(test="dev"), None, "source.test does not apply"),
        (SourceConfig(), "writer", "no column writer; partition.key can be package"),
    ],
)
def test_builtin_has_no_columns_to_choose(
    source: SourceConfig, key: str | None, message: str
) -> None:
    with pytest.raises(DroppeftError, match=message):
        load_text("builtin", source, key)
