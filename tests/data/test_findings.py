"""What reading finds is counted, and every row that was read is accounted for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from droppeft.config import PartitionConfig, SourceConfig
from droppeft.data.checks import measured, partitioned
from droppeft.data.conversation_sources import load_conversations
from droppeft.data.findings import Findings
from droppeft.data.labels import similar_names
from droppeft.data.partition import partition_rows
from droppeft.data.sources import load_text
from refusals import refused


def accounted(found: Findings) -> int:
    """Rows that are used, or left out for a reason."""
    return (
        found.train_rows
        + found.test_rows
        + found.beyond_limit
        + found.left_out_rows
        + found.set_aside_rows
        + found.incomplete
    )


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A folder with rows of two owners, and all that can be wrong with them."""
    rows = [
        {"text": f"text {n}", "label": "ab"[n % 2], "who": f"w{n % 2}", "day": "2024-01-31"}
        for n in range(60)
    ]
    odd = [
        {"text": "text 1", "label": "b", "who": "w1"},  # a repetition
        {"text": "text 2", "label": " b", "who": "w1"},  # with another label
        {"text": "new", "label": "B ", "who": "w9"},  # a class that is rare and named as another
        {"text": " ", "label": None, "who": "w1"},
        {"text": "x", "label": "  ", "who": "w1"},
        {"text": "y", "label": "a", "who": None},
    ]
    write(tmp_path, "train.jsonl", [*rows, *odd])
    write(tmp_path, "test.jsonl", [{"text": "text 5", "label": "a"}, {"text": "z", "label": "b"}])
    return tmp_path


def test_everything_is_counted(reviews: Path) -> None:
    data = load_text(str(reviews), SourceConfig(missing="drop"), "who")
    clients = partition_rows(
        data.train.labels,
        data.train.keys,
        2,
        PartitionConfig(kind="natural", key="who"),
        seed=0,
    )
    found = partitioned(data.findings, data.train.keys, clients, min_rows=20)
    found = measured(found, np.array([5, 5, 40]), max_length=20, longest_possible=512)
    assert found.columns == {"text": "text", "label": "label", "owner": "who"}
    assert (found.without_text, found.without_label, found.without_owner) == (1, 2, 1)
    assert found.stripped_labels == 2
    assert (found.repeated, found.contradictory, found.in_both) == (2, 2, 1)
    assert found.similar_classes == (("B", "b"),)
    assert found.rare_classes == {"B": 1}
    assert (found.left_out_rows, found.left_out_owners) == (1, 1)
    assert found.rows_read == accounted(found) == 68
    assert found.sentences() == [
        "2 labels had spaces around, which were removed (source.strip_labels)",
        "left out: 1 row without a text, 2 rows without a label, 1 row without an owner, 3 rows "
        "in all (source.missing=drop)",
        "classes with nearly the same name: 'B' and 'b'; spell them alike if they are one",
        "one class has fewer than 10 training rows: B (1)",
        "2 training rows with the text of an earlier one",
        "2 training rows with a text that has another label in another row",
        "the texts of 1 of 2 test rows are also in training rows, which makes the measured "
        "quality too high",
        "the partition leaves out 1 of 63 training rows: those of 1 owner with fewer than "
        "partition.min_rows=20 rows each",
        "33.3% of the training rows are longer than training.max_length=20 tokens and are cut "
        "(median 5 tokens; the model takes up to 512)",
    ]
    assert json.loads(json.dumps(found.as_tree()))["sentences"] == found.sentences()
    # A limit leaves rows out, too, and the rows that remain are compared.
    limits = SourceConfig(missing="drop", max_train_rows=10, max_test_rows=1)
    limited = load_text(str(reviews), limits).findings
    assert limited.beyond_limit == 64 - 10 + 2 - 1
    assert limited.rows_read == accounted(limited) == 68


def test_clean_data_have_nothing_to_say(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(40)]
    write(tmp_path, "train.jsonl", rows)
    write(tmp_path, "test.jsonl", [{"text": "other", "label": 1}])
    found = load_text(str(tmp_path), SourceConfig()).findings
    assert found.sentences() == []
    assert (found.rows_read, found.train_rows, found.test_rows) == (41, 40, 1)
    assert measured(found, np.array([20, 9]), 20, 512).sentences() == []
    assert load_text("builtin", SourceConfig()).findings.sentences() == []


def test_conversations_are_checked_too(tmp_path: Path) -> None:
    rows = [
        {"Prompt": f"p{n}", "Completion": "c", "kind": "k ", "who": f"w{n % 2}"} for n in range(20)
    ]
    odd = [
        {"Prompt": "p1", "Completion": "c", "kind": "k", "who": "w0"},
        {"Prompt": "p2", "Completion": " ", "kind": "k", "who": "w0"},
        {"Prompt": "p3", "Completion": None, "kind": "k", "who": "w0"},
        {"Prompt": "p4", "Completion": "c", "kind": None, "who": "w0"},
        {"Prompt": "p5", "Completion": "c", "kind": "k", "who": None},
    ]
    write(tmp_path, "train.jsonl", [*rows, *odd])
    write(tmp_path, "test.jsonl", rows[:3])
    with refused(
        "row 22: completion is an empty completion, and 1 other rows .*source.missing=drop"
    ):
        load_conversations(str(tmp_path), SourceConfig(), "who")
    drop = SourceConfig(missing="drop", label="kind")
    data = load_conversations(str(tmp_path), drop, "who")
    found = data.findings
    assert (found.without_text, found.without_label, found.without_owner) == (2, 1, 1)
    assert (found.repeated, found.in_both, found.contradictory) == (1, 3, 0)
    assert data.label_names == ("k",)
    assert len(data.train.keys or ()) == len(data.train) == found.train_rows == 21
    assert found.rows_read == accounted(found) == 28


def test_labels_may_be_a_quantity(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 50} for n in range(200)]
    found = load_text(str(write(tmp_path, "rows.jsonl", rows)), SourceConfig()).findings
    assert "label has 50 different numbers; if it is a quantity, it" in found.sentences()[1]


def test_names_are_similar_but_for_case_spaces_and_punctuation() -> None:
    names = ("Sci/Tech", "sci tech", "C", "C++", "C#", "-1", "1", "1.0", "10", "?", "!")
    assert similar_names(names) == (("Sci/Tech", "sci tech"), ("1", "1.0"))
