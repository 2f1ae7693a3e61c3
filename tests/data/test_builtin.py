import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from droppeft.config import SourceConfig
from droppeft.data import builtin
from droppeft.data.builtin import Row, drop_near_duplicates, load_builtin, opening_paragraph
from droppeft.data.reference import majority_accuracy, tfidf_accuracy
from droppeft.data.sources import load_text
from droppeft.data.texts import TextData
from droppeft.errors import DroppeftError


@pytest.fixture(scope="module")
def data(cache_folder: Path) -> TextData:
    return load_builtin(cache_folder)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use two libraries and few rows, for tests that build the task more than once."""
    monkeypatch.setattr(builtin, "LIBRARIES", {"networkx": "networkx", "sympy": "sympy"})
    monkeypatch.setattr(builtin, "TRAIN_ROWS", 12)
    monkeypatch.setattr(builtin, "TEST_ROWS", 4)


def test_the_pinned_versions_give_the_recorded_texts(data: TextData) -> None:
    assert data.content_hash == builtin.EXPECTED_HASH


def test_every_library_has_as_many_rows_in_each_part(data: TextData) -> None:
    assert data.label_names == tuple(builtin.LIBRARIES)
    assert set(np.bincount(data.train.labels)) == {builtin.TRAIN_ROWS}
    assert set(np.bincount(data.test.labels)) == {builtin.TEST_ROWS}


def test_labels_name_the_library_of_the_file(data: TextData) -> None:
    for table in (data.train, data.test):
        names = [data.label_names[label] for label in table.labels]
        assert names == [file.split("/")[0] for file in table.keys or ()]


def test_no_source_file_is_in_both_parts(data: TextData) -> None:
    assert not set(data.train.keys or ()) & set(data.test.keys or ())


def test_no_file_gives_more_than_its_share(data: TextData) -> None:
    [(_, most)] = Counter(data.train.keys).most_common(1)
    assert most <= builtin.TEXTS_PER_FILE


def test_no_near_duplicates_remain(data: TextData) -> None:
    rows = [Row(text, "", "", "") for text in data.test.texts + data.train.texts]
    assert drop_near_duplicates(rows) == rows


def test_texts_are_prose_on_one_line_without_the_library(data: TextData) -> None:
    names = re.compile("|".join([*builtin.LIBRARIES, "numpy", "scikit"]), re.IGNORECASE)
    for text in data.train.texts + data.test.texts:
        assert not names.search(text)
        assert len(re.findall(r"[A-Za-z]{2,}", text)) >= builtin.MIN_WORDS
        assert text == " ".join(text.split())
        assert not text.startswith(">>>")


def test_the_task_is_neither_trivial_nor_impossible(data: TextData) -> None:
    assert majority_accuracy(data) == 1 / len(builtin.LIBRARIES)
    assert 0.5 < tfidf_accuracy(data) < 0.8


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            "Apply `torch.nn.Linear` to\nevery :class:`~pandas.Series` of the plt figure.\n\nMore.",
            "Apply LIB to every LIB of the LIB figure.",
        ),
        (
            "Compute a mean of all the values along axes.\n    Args:\n        values: many",
            "Compute a mean of all the values along axes.",
        ),
        ("Returns the sum of both of its operands.",) * 2,
        ("SymPy's and PyTorchs' way of doing this in Hugging Face code is odd", None),
        ("Too short to say anything.", ""),
        (">>> one two three four five six seven eight nine", ""),
        ("Args:\n  one two three four five six seven eight nine", ""),
        ("name (str, optional): one two three four five six seven eight", ""),
        ("See https://networkx.org/a/b for one two three four five six seven.", None),
        ("", ""),
    ],
)
def test_opening_paragraph(docstring: str, expected: str | None) -> None:
    text = opening_paragraph(docstring)
    if expected is None:
        assert text
        assert not re.search("sympy|torch|hugging|networkx", text, re.IGNORECASE)
    else:
        assert text == expected


def test_the_first_of_near_duplicates_is_used() -> None:
    texts = [
        "Compute eigenvalues for symmetric sparse matrices quickly",
        "Compute eigenvalues for symmetric sparse matrices slowly",
        "Draw arrows between boxes inside figures",
    ]
    rows = [Row(text, "library", "file", "train") for text in texts]
    assert drop_near_duplicates(rows) == [rows[0], rows[2]]


def test_a_row_is_only_removed_for_one_that_is_used() -> None:
    # Adjacent rows share 5 of 7 words (0.71), first and last 4 of 8 (0.5): only the middle goes.
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
    rows = [Row(" ".join(words[start : start + 6]), "", "", "") for start in range(3)]
    assert drop_near_duplicates(rows) == [rows[0], rows[2]]


@pytest.mark.usefixtures("small")
def test_the_cache_returns_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = load_builtin(tmp_path)
    monkeypatch.setattr(builtin, "build", lambda: pytest.fail("built again"))
    again = load_builtin(tmp_path)
    assert again.content_hash == built.content_hash
    assert again.train.texts == built.train.texts
    assert again.test.keys == built.test.keys


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"[]",
        lambda content: b'{"hash": 1}',
        lambda content: content.replace(b"the", b"teh"),
    ],
    ids=["empty", "half", "list", "keys", "text"],
)
def test_a_damaged_cache_is_replaced(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    built = load_builtin(tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert load_builtin(tmp_path).content_hash == built.content_hash
    assert file.read_bytes() == whole


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert len(load_builtin(tmp_path / "file").train) == 24


@pytest.mark.usefixtures("small")
def test_another_version_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_builtin(tmp_path)
    monkeypatch.setattr(builtin.importlib.metadata, "version", lambda name: "0.0")
    load_builtin(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DroppeftError, match="matplotlib, which is not installed; pip install"):
        builtin.build()


def test_load_text_returns_the_builtin_data_and_its_owners(data: TextData) -> None:
    plain = load_text("builtin", SourceConfig())
    assert plain.content_hash == data.content_hash
    assert plain.train.keys is None
    owned = load_text("builtin", SourceConfig(max_train_rows=40), key="package")
    assert len(owned.train) == 40
    assert all(re.fullmatch(r"\w+/[\w.]+", owner) for owner in owned.train.keys or ("none",))
    assert owned.test.keys is None


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
