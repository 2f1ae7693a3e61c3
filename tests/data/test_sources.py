import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from droppeft.config import SourceConfig
from droppeft.data.sources import SPLIT_BY_US, load_text
from droppeft.data.texts import TextData, TextTable
from droppeft.errors import DroppeftError
from refusals import refused

Write = Callable[[Path, Mapping[str, Any]], Path]

DEFAULT = SourceConfig()
TRAIN = {"text": ["one, two", 'a "b"\nc', "x", "ü"], "label": [2, 5, 2, 5]}
TEST = {"text": ["y", "z"], "label": [5, 2]}


@pytest.fixture
def folder(tmp_path: Path, write: Write) -> Path:
    write(tmp_path / "train.parquet", TRAIN)
    write(tmp_path / "test.parquet", TEST)
    return tmp_path


def load(path: Path, source: SourceConfig = DEFAULT, key: str | None = None) -> TextData:
    return load_text(str(path), source, key)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_all_formats_give_the_same_task(tmp_path: Path, write: Write, suffix: str) -> None:
    write(tmp_path / f"train{suffix}", TRAIN)
    write(tmp_path / f"test{suffix}", TEST)
    data = load(tmp_path)
    assert data.train.texts == tuple(TRAIN["text"])
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.train.labels.dtype == np.int64
    assert data.test.labels.tolist() == [1, 0]
    assert data.label_names == ("2", "5")
    assert data.train.pairs is None
    assert data.train.keys is None
    assert list(tmp_path.iterdir()) == [*tmp_path.glob("t*")]  # no other file was written


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
        (pa.array([3, 1, 3], pa.uint8()), ("1", "3"), [1, 0, 1]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
    ],
)
def test_labels_become_indices(
    tmp_path: Path, write: Write, labels: Any, names: tuple[str, ...], indices: list[int]
) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", {"text": ["x", "y", "z"], "label": labels})
    data = load(tmp_path)
    assert data.label_names == names
    assert data.train.labels.tolist() == indices


@pytest.mark.parametrize(
    ("columns", "texts", "pairs"),
    [
        (("text",), "text", None),
        (("content", "sentence"), "sentence", None),
        (("text", "sentence1", "sentence2"), "sentence1", "sentence2"),
        (("hypothesis", "premise"), "premise", "hypothesis"),
        (("question2", "question1"), "question1", "question2"),
        (("sentence1", "content"), "content", None),
    ],
)
def test_text_columns_are_found_by_name(
    tmp_path: Path, write: Write, columns: tuple[str, ...], texts: str, pairs: str | None
) -> None:
    table = {**{name: [f"{name} a", f"{name} b"] for name in columns}, "label": [0, 1]}
    write(tmp_path / "train.jsonl", table)
    write(tmp_path / "dev.jsonl", table)
    data = load(tmp_path)
    assert data.train.texts == (f"{texts} a", f"{texts} b")
    assert data.train.pairs == (pairs and (f"{pairs} a", f"{pairs} b"))


def test_columns_and_splits_can_be_named(tmp_path: Path, write: Write) -> None:
    table = {"a": ["1a", "2a"], "b": ["1b", "2b"], "text": ["no", "no"], "kind": ["k", "l"]}
    write(tmp_path / "fold1.csv", {**table, "label": [0, 0]})
    write(tmp_path / "fold2.csv", table)
    source = SourceConfig(text=("b", "a"), label="kind", train="fold2", test="fold1")
    data = load(tmp_path, source)
    assert data.train.texts == ("1b", "2b")
    assert data.train.pairs == ("1a", "2a")
    assert data.label_names == ("k", "l")


def test_all_rows_of_a_csv_file_decide_what_a_column_holds(tmp_path: Path, write: Write) -> None:
    """By default, the reader infers types from the first megabyte only."""
    labels = ["1"] * 20 + ["many"] * 20
    path = write(
        tmp_path / "rows.csv",
        {"text": [f"{row}" + " long" * 20_000 for row in range(40)], "label": labels},
    )
    assert load(path).label_names == ("1", "many")


def test_a_jsonl_row_may_be_long(tmp_path: Path, write: Write) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"text": [f"{row}" * 3_000_000 for row in range(6)], "label": [0, 1] * 3},
    )
    assert len(load(path).train.texts[0]) == 3_000_000


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (("test", "validation", "dev"), "test"),
        (("dev", "validation_matched", "validation"), "validation"),
        (("dev", "validation_matched", "validation_mismatched"), "validation_matched"),
        (("dev",), "dev"),
    ],
)
def test_the_test_split_is_found(
    tmp_path: Path, write: Write, present: tuple[str, ...], expected: str
) -> None:
    for name in ("train", *present):
        write(tmp_path / f"{name}.jsonl", {"text": [name, name], "label": [0, 1]})
    assert load(tmp_path).test.texts == (expected, expected)


def test_shards_are_joined_in_order(folder: Path, write: Write) -> None:
    (folder / "train.parquet").unlink()
    for part, text, label in ((0, "a", 2), (1, "b", 5)):
        write(folder / f"train-0000{part}-of-00002.parquet", {"text": [text], "label": [label]})
    assert load(folder).train.texts == ("a", "b")


def test_two_files_of_one_split_are_refused(folder: Path, write: Write) -> None:
    write(folder / "train.csv", TRAIN)
    with pytest.raises(DroppeftError, match=r"train\.csv and train\.parquet are the same split"):
        load(folder)


def test_shards_with_other_columns_are_refused(folder: Path, write: Write) -> None:
    (folder / "train.parquet").unlink()
    write(folder / "train-00000-of-00002.parquet", TRAIN)
    write(folder / "train-00001-of-00002.parquet", {"text": ["a"]})
    with pytest.raises(DroppeftError, match="different columns"):
        load(folder)


def test_owners_are_read_for_the_training_rows(folder: Path, write: Write) -> None:
    write(folder / "train.parquet", {**TRAIN, "user": [7, 7, 8, 9]})
    data = load(folder, key="user")
    assert data.train.keys == ("7", "7", "8", "9")
    assert data.test.keys is None


@pytest.mark.parametrize(
    ("split", "columns", "source", "message"),
    [
        (
            "train",
            {"words": ["x"], "label": [1]},
            DEFAULT,
            "no text column found among words, label",
        ),
        (
            *("train", {"text": list("abcdefgh"), "score": [n / 8 for n in range(8)]}, DEFAULT),
            "no label column found among text, score; name it with source.label, or task",
        ),
        ("train", {"text": ["x"], "y": [1]}, DEFAULT, "no label column found among text, y; name"),
        ("test", {"body": ["x"], "label": [2]}, DEFAULT, "no column text .* columns: body, label"),
        ("train", TRAIN, SourceConfig(text=("words",)), r"no column words \(source.text\)"),
        ("train", TRAIN, SourceConfig(label="kind"), r"no column kind \(source.label\)"),
        (
            "train",
            {"text": ["x", None], "label": [2, 5]},
            DEFAULT,
            "text is missing in row 2; correct this, or leave such rows out with source.missing",
        ),
        ("train", {"text": ["x", "y"], "label": [None, 2]}, DEFAULT, "label is missing in row 1"),
        ("train", {"text": ["x", "y"], "label": ["a", ""]}, DEFAULT, "label is missing in row 2"),
        (
            "train",
            {"text": ["x", "y"], "label": [1.5, 2]},
            DEFAULT,
            "label has numbers that are not whole, such as 1.5",
        ),
        ("train", {"text": ["x", "y"], "label": [[1], [2]]}, DEFAULT, "label has type list"),
        (
            "train",
            {"text": [["x"], ["y"]], "label": [2, 5]},
            DEFAULT,
            "text has type list.* not text",
        ),
        ("train", {"text": ["x", "y"], "label": [2, 2]}, DEFAULT, "only one value, 2"),
        ("train", {"text": pa.array([], pa.string()), "label": []}, DEFAULT, "has no rows"),
        ("test", {"text": ["x", "y"], "label": [2, -1]}, DEFAULT, "-1, a hidden label, in row 2"),
        ("test", {"text": ["x", "y"], "label": [2, 9]}, DEFAULT, "label 9 in row 2 does not occur"),
    ],
)
def test_a_wrong_table_is_refused_in_one_sentence(
    folder: Path,
    write: Write,
    split: str,
    columns: Mapping[str, Any],
    source: SourceConfig,
    message: str,
) -> None:
    path = write(folder / f"{split}.parquet", columns)
    with pytest.raises(DroppeftError, match=message) as caught:
        load(folder, source)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_hidden_label_suggests_another_split_where_one_can_be_named(
    folder: Path, write: Write, split: str
) -> None:
    write(folder / f"{split}.parquet", {"text": ["x", "y"], "label": [-1, 5]})
    with refused(r"write labels \(text if -1 is a class\)") as caught:
        load(folder)
    assert ("source.test" in str(caught.value)) == (split == "test")


def test_a_missing_owner_column_is_named(folder: Path) -> None:
    with pytest.raises(DroppeftError, match=r"no column user \(partition.key\)"):
        load(folder, key="user")


def test_a_column_that_occurs_twice_is_refused(folder: Path) -> None:
    (folder / "train.parquet").unlink()
    (folder / "train.csv").write_text("text,label,text\na,2,b\nc,5,d\n")
    with pytest.raises(DroppeftError, match="has the column text twice; rename"):
        load(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SourceConfig(train="fit"), "no split fit, only test, train; name one with source.train"),
        (SourceConfig(test="dev"), "no split dev, only test, train; name one with source.test"),
        (SourceConfig(test="train"), "train cannot be both"),
    ],
)
def test_a_wrong_split_is_refused(folder: Path, source: SourceConfig, message: str) -> None:
    with pytest.raises(DroppeftError, match=message):
        load(folder, source)


def test_a_folder_without_a_test_split_is_split(one_file: Path, tmp_path: Path) -> None:
    whole = load(one_file)
    (tmp_path / "folder").mkdir()
    for name in ("train.csv", "reviews.csv"):  # a single file may have any name
        one_file.rename(tmp_path / "folder" / name)
        data = load(tmp_path / "folder")
        assert data.content_hash == whole.content_hash
        assert data.findings.remarks == (SPLIT_BY_US,)
        (tmp_path / "folder" / name).rename(one_file)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("content", [b"", b'\x00\xff{"a'])
def test_an_unreadable_file_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(DroppeftError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_file_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("text")
    with pytest.raises(DroppeftError, match=r"has no \.csv, \.tsv, .* file"):
        load(tmp_path)
    with pytest.raises(DroppeftError, match=r"train\.txt is not one of \.csv.* rename it"):
        load(tmp_path / "train.txt")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "rows.csv", "a/b/c"])
def test_a_missing_path_is_not_looked_for_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the hub was used"))
    with pytest.raises(DroppeftError, match="no such file or folder"):
        load_text(name, DEFAULT)


def test_a_misspelt_file_is_named_with_the_one_that_exists(tmp_path: Path) -> None:
    (tmp_path / "docstrings.csv").write_text("text,label\n")
    meant = re.escape(f"did you mean {tmp_path / 'docstrings.csv'}?")
    with pytest.raises(DroppeftError, match=meant):
        load_text(str(tmp_path / "docstring.csv"), DEFAULT)


# One file


@pytest.fixture
def one_file(tmp_path: Path, write: Write) -> Path:
    """30 rows of class a, 10 of b and one of c."""
    labels = ["a"] * 30 + ["b"] * 10 + ["c"]
    texts = [f"text {row}" for row in range(41)]
    return write(tmp_path / "rows.csv", {"text": texts, "label": labels, "who": texts})


def test_a_fifth_of_every_class_of_a_single_file_is_the_test_split(one_file: Path) -> None:
    data = load(one_file, key="who")
    assert np.bincount(data.test.labels, minlength=3).tolist() == [6, 2, 0]
    assert np.bincount(data.train.labels).tolist() == [24, 8, 1]
    assert sorted(data.train.texts + data.test.texts) == sorted(f"text {row}" for row in range(41))
    assert data.train.keys == data.train.texts
    assert data.test.keys is None


def test_the_split_of_a_single_file_does_not_depend_on_row_order(
    one_file: Path, write: Write
) -> None:
    before = load(one_file)
    header, *rows = one_file.read_text().splitlines()
    one_file.write_text("\n".join([header, *reversed(rows)]))
    assert set(load(one_file).test.texts) == set(before.test.texts)


def test_equal_texts_are_on_one_side(tmp_path: Path, write: Write) -> None:
    texts = [f"text {row % 40}" for row in range(100)]
    labels = [row % 2 for row in range(99)] + [0]  # the last text has the other label too
    data = load(write(tmp_path / "rows.csv", {"text": texts, "label": labels}))
    assert data.findings.in_both == 0
    assert len(data.train) + len(data.test) == 100
    assert 8 <= len(set(data.test.texts)) <= 9


def test_a_single_file_of_too_few_rows_is_refused(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "rows.csv", {"text": ["x", "y"], "label": [0, 1]})
    with pytest.raises(DroppeftError, match="too few rows per class"):
        load(path)


def test_a_single_file_has_no_splits_to_name(one_file: Path) -> None:
    with pytest.raises(DroppeftError, match=r"source\.test does not apply to the single file"):
        load(one_file, SourceConfig(test="dev"))


# Limits on the number of rows


def test_a_limit_selects_a_fixed_subset_of_rows(one_file: Path) -> None:
    whole = load(one_file, key="who")
    part = load(one_file, SourceConfig(max_train_rows=20, max_test_rows=3), key="who")
    assert (len(part.train), len(part.test)) == (20, 3)
    by_text = dict(zip(whole.train.texts, whole.train.labels.tolist(), strict=True))
    assert [by_text[text] for text in part.train.texts] == part.train.labels.tolist()
    assert part.train.keys == part.train.texts
    assert part.train.texts != whole.train.texts[:20]
    assert part.label_names == whole.label_names
    again = load(one_file, SourceConfig(max_train_rows=20, max_test_rows=3))
    assert again.content_hash == part.content_hash
    fewer = load(one_file, SourceConfig(max_train_rows=5))
    assert fewer.train.texts == part.train.texts[:5]


def test_a_limit_beyond_the_rows_changes_nothing(one_file: Path) -> None:
    limited = load(one_file, SourceConfig(max_train_rows=1000))
    assert limited.content_hash == load(one_file).content_hash


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the hub by one data set, and record the calls."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"sentence": ["x", "y"], "label": [1, 0]}
    split = datasets.Dataset.from_dict(rows, features)
    calls = []

    def load_dataset(*arguments: Any) -> datasets.DatasetDict:
        calls.append(arguments)
        return datasets.DatasetDict(train=split, validation=split.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_id_is_loaded(hub: list[tuple[Any, ...]]) -> None:
    data = load_text("someone/reviews:small", DEFAULT)
    assert hub == [("someone/reviews", "small")]
    assert data.label_names == ("bad", "good")
    assert data.train.texts == ("x", "y")
    assert data.train.labels.tolist() == [1, 0]
    assert data.test.texts == ("x",)


def test_a_hub_id_needs_no_configuration(hub: list[tuple[Any, ...]]) -> None:
    load_text("reviews", DEFAULT)
    assert hub == [("reviews", None)]


def test_a_hub_that_cannot_be_reached_is_an_error_of_one_line() -> None:
    with pytest.raises(DroppeftError, match=r"^data=nobody/nothing is no file or folder") as caught:
        load_text("nobody/nothing", DEFAULT)
    assert "\n" not in str(caught.value)


def test_class_names_that_do_not_fit_are_ignored(tmp_path: Path) -> None:
    names = {"info": {"features": {"label": {"names": ["zero", "one"]}}}}
    table = pa.table({"text": list("abcdefghij"), "label": [0, 7] * 5})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet").label_names == ("0", "7")


# The hash of a task


TABLE = TextTable(("ab", "c"), None, np.array([0, 1]))
TASK = TextData("n", TABLE, TABLE, ("p", "q"))


def test_the_hash_covers_all_content_and_nothing_else() -> None:
    others = [
        replace(TASK, train=replace(TABLE, texts=("a", "bc"))),
        replace(TASK, train=replace(TABLE, pairs=("d", "e"))),
        replace(TASK, test=replace(TABLE, labels=np.array([1, 0]))),
        replace(TASK, label_names=("p", "r")),
    ]
    assert len({task.content_hash for task in (TASK, *others)}) == 5
    same = replace(TASK, name="m", train=replace(TABLE, keys=("o", "o")))
    assert same.content_hash == TASK.content_hash


# Real data


@pytest.mark.parametrize(
    ("name", "train", "test", "classes", "paired"),
    [
        ("ag_news", 26_855, 7_600, 4, False),
        ("qqp", 21_391, 7_598, 2, True),
        ("mnli", 12_808, 9_815, 3, True),
        ("mrpc", 3_667, 1_725, 2, True),
        ("rte", 2_490, 277, 2, True),
        ("cola", 8_551, 1_043, 2, False),
        ("news20", 11_222, 7_452, 20, False),
    ],
)
def test_real_data_loads_without_options(
    data_folder: Path, name: str, train: int, test: int, classes: int, paired: bool
) -> None:
    data = load(data_folder / name)
    assert (len(data.train), len(data.test)) == (train, test)
    assert data.label_names == tuple(str(number) for number in range(classes))
    assert (data.train.pairs is not None) == (data.test.pairs is not None) == paired


def test_real_owners_load(data_folder: Path) -> None:
    source = SourceConfig(text=("instruction",), test="train")
    with pytest.raises(DroppeftError, match="cannot be both"):
        load(data_folder / "dolly15k", source, key="client")
    data = load(data_folder / "dolly15k", source.model_copy(update={"test": None}), key="client")
    assert len(set(data.train.keys or ())) == 10
