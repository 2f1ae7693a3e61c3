"""Odd files, and what happens when they are read for a classification.

``python tests/odd_inputs.py`` writes what happens to ``docs/odd_inputs.json``, from which
``docs/reference/data.md`` is made. A test compares.
"""

import gzip
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from droppeft.config import SourceConfig
from droppeft.data.sources import SPLIT_BY_US, load_text
from droppeft.errors import DroppeftError

FILE = Path(__file__).parents[1] / "docs" / "odd_inputs.json"

Write = Callable[[Path], object]

TEXTS = [f"{word} text {number}" for number in range(20) for word in ("good", "bad")]
LABELS = ["pos", "neg"] * 20


@dataclass(frozen=True)
class Odd:
    """A folder with files, of which one is read, or all.

    Attributes:
        group: what it is about.
        what: what is odd, for readers.
        files: content, or a function that writes it, by name.
        data: the file that is read; empty for the folder.
        source: settings ``source.*``.
    """

    group: str
    what: str
    files: dict[str, str | bytes | Write]
    data: str = ""
    source: dict[str, Any] = field(default_factory=dict)


def outcome(odd: Odd, folder: Path) -> str:
    """Write the files and say what happens: rows, classes and findings, or the error."""
    for name, content in odd.files.items():
        if callable(content):
            content(folder / name)
        else:
            raw = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(raw)
    try:
        data = load_text(str(folder / odd.data), SourceConfig(**odd.source))
    except DroppeftError as error:
        return f"refused: {str(error).replace(f'{folder}/', '').replace(str(folder), 'folder')}"
    rows, found = len(data.train) + len(data.test), data.findings.sentences()
    more = "".join(f"; {one}" for one in found if one != SPLIT_BY_US)
    return f"{rows} rows, classes {', '.join(data.label_names)}{more}"


def table(
    texts: Sequence[Any] = TEXTS,
    labels: Sequence[Any] = LABELS,
    *,
    sep: str = ",",
    head: str = "text,label",
    end: str = "\n",
) -> str:
    """Delimited text without quotes."""
    rows = [f"{text}{sep}{label}" for text, label in zip(texts, labels, strict=True)]
    return "".join(line + end for line in [head.replace(",", sep), *rows])


def with_rows(*rows: str) -> str:
    """The usual table and more rows."""
    return table() + "".join(f"{row}\n" for row in rows)


def labelled(*labels: Any) -> str:
    """The usual texts, with these labels in turn."""
    return table(labels=(labels * 40)[:40])


def arrow(labels: Any = LABELS, texts: Any = TEXTS) -> pa.Table:
    return pa.table({"text": texts, "label": labels})


def parquet(labels: Any = LABELS, texts: Any = TEXTS) -> Write:
    return lambda path: pa.parquet.write_table(arrow(labels, texts), path)


def json_list(labels: Sequence[Any] = LABELS, texts: Sequence[Any] = TEXTS) -> list[Any]:
    return [{"text": a, "label": b} for a, b in zip(texts, labels, strict=True)]


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, arrow().schema) as writer:
        writer.write_table(arrow())


def with_names() -> datasets.Dataset:
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    return datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0] * 20}, features)


def saved(path: Path) -> None:
    with_names().save_to_disk(str(path))


def saved_splits(path: Path) -> None:
    data = with_names()
    datasets.DatasetDict(train=data, test=data.select([0, 1])).save_to_disk(str(path))


def one(group: str, what: str, name: str, content: str | bytes | Write, **source: Any) -> Odd:
    """A single file."""
    return Odd(group, what, {name: content}, name, source)


def two(group: str, what: str, train: Any, test: Any, **source: Any) -> Odd:
    """A folder with two splits; contents may come with a suffix."""
    named = [one if isinstance(one, tuple) else (".csv", one) for one in (train, test)]
    names = [f"train{named[0][0]}", f"test{named[1][0]}"]
    return Odd(group, what, dict(zip(names, (one for _, one in named), strict=True)), "", source)


CSV, FILES, COLUMNS = "delimited text", "other files", "columns"
CLASSES, MISSING, ROWS = "labels", "missing values", "rows"

QUOTED = '"good, and\nlong",pos\n"so ""bad""",neg\n'
STRAY = '"dull and slow,neg\nlovely pace,pos\nfive feet 6",neg\n'

CASES = (
    one(CSV, "semicolons", "reviews.csv", table(sep=";")),
    one(CSV, "tabs in a `.csv`", "reviews.csv", table(sep="\t")),
    one(CSV, "vertical bars", "reviews.csv", table(sep="|")),
    one(CSV, "commas in texts of a file with semicolons", "a.csv", table(
        [text.replace(" ", ", ") for text in TEXTS], sep=";")),
    one(CSV, "`.tsv` whose texts have single quotes `\"`", "a.tsv", table(
        [f'6" {text}' for text in TEXTS], sep="\t")),
    one(CSV, "a space after each comma", "a.csv", table(sep=", ", head="text,label")),
    one(CSV, "quoted texts with commas, line breaks and doubled quotes", "a.csv",
        table() + QUOTED),
    one(CSV, "quotes escaped by a backslash", "a.csv", with_rows(r'"a \"good\", b",pos')),
    one(CSV, "a quote that another line closes by chance", "a.csv", with_rows() + STRAY),
    one(CSV, "the same in a file that quotes texts", "a.csv", with_rows('"x, y",pos') + STRAY),
    one(CSV, "a quote that is never closed", "a.csv", with_rows('"x, y",pos', '"bad,neg')),
    one(CSV, "a comma in a text without quotes", "a.csv", with_rows("good, better,pos")),
    one(CSV, "a row with too few fields", "a.csv", with_rows("good")),
    one(CSV, "Windows line ends and blank lines", "a.csv", table(end="\r\n\r\n")),
    one(CSV, "a byte order mark", "a.csv", b"\xef\xbb\xbf" + table().encode()),
    one(CSV, "UTF-16", "a.csv", table().encode("utf-16")),
    one(CSV, "Windows-1252", "a.csv", with_rows("café,pos").encode("cp1252")),
    one(CSV, "no line with the names of the columns", "a.csv", table(head="good text 99,pos")),
    one(CSV, "the same with three columns", "a.csv",
        "".join(f"{n},{a},{b}\n" for n, (a, b) in enumerate(zip(TEXTS, LABELS, strict=True)))),
    one(CSV, "a column that occurs twice", "a.csv", "text,label,text\na,1,b\n"),
    one(CSV, "a header alone", "a.csv", "text,label\n"),
    one(CSV, "an empty file", "a.csv", ""),
    one(CSV, "a spreadsheet named `.csv`", "a.csv", b"PK\x03\x04\x14\0\0\0"),
    one(CSV, "`.CSV`", "A.CSV", table()),
    one(CSV, "`.csv.gz`", "a.csv.gz", gzip.compress(table().encode(), mtime=0)),
    one(CSV, "`.csv.gz` that is not compressed", "a.csv.gz", table()),
    one(FILES, "`.json` with a list", "a.json", json.dumps(json_list(), indent=1)),
    one(FILES, "`.json` with an object per line", "a.json", lines(json_list())),
    one(FILES, "`.json` with an object per column, as pandas writes by default", "a.json",
        json.dumps({"text": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}})),
    one(FILES, "a line that is not JSON", "a.jsonl", lines(json_list()) + '{"text": "x\n'),
    one(FILES, "numbers and texts in one column of JSON", "a.jsonl",
        lines([*json_list(), {"text": "x", "label": 1}])),
    one(FILES, "dates as labels in JSON", "a.jsonl",
        lines(json_list(["2024-01-31", "2024-02-01"] * 20))),
    one(FILES, "Parquet", "a.parquet", parquet()),
    one(FILES, "Arrow, as a file", "a.arrow",
        lambda path: pa.feather.write_feather(arrow(), path)),
    one(FILES, "Arrow, as a stream", "a.arrow", stream),
    one(FILES, "a damaged Parquet file", "a.parquet", b"PAR1"),
    one(FILES, "a folder from `save_to_disk`", "saved", saved),
    one(FILES, "the same with two splits", "saved", saved_splits),
    Odd(FILES, "a folder with `train.csv` alone", {"train.csv": table()}),
    Odd(FILES, "a folder with one file of another name", {"reviews.csv": table()}),
    Odd(FILES, "a folder with `train` twice",
        {"train.csv": table(), "train.json": "[]", "test.csv": table()}),
    one(FILES, "an Excel file", "a.xlsx", b"PK"),
    one(FILES, "a Git LFS pointer", "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    one(COLUMNS, "`Review` and `STARS`", "a.csv", table(head="Review,STARS")),
    one(COLUMNS, "two columns of unknown names, and an index", "a.csv",
        ",words,kind\n" + "".join(
            f"{n},{a},{b}\n" for n, (a, b) in enumerate(zip(TEXTS, LABELS, strict=True)))),
    one(COLUMNS, "more columns of unknown names", "a.csv",
        "words,kind,day\n" + "".join(
            f"{a},{b},{n}\n" for n, (a, b) in enumerate(zip(TEXTS, LABELS, strict=True)))),
    one(COLUMNS, "a name with another case in the setting", "a.csv",
        table(head="words,kind"), text="Words", label="kind"),
    one(CLASSES, "whole numbers, which are in order", "a.csv", labelled(10, 9)),
    one(CLASSES, "`007` and `010`", "a.csv", labelled("007", "010")),
    one(CLASSES, "-1 and 1", "a.csv", labelled("-1", "1")),
    one(CLASSES, "-1 beside 0 and 1", "a.csv", labelled("0", "1", "1", "-1")),
    one(CLASSES, "the same, to be left out", "a.csv", labelled("0", "1", "1", "-1"),
        missing="drop"),
    one(CLASSES, "`true` and `false` in CSV", "a.csv", labelled("true", "false")),
    one(CLASSES, "booleans in Parquet", "a.parquet", parquet([True, False] * 20)),
    one(CLASSES, "booleans in JSON", "a.jsonl", lines(json_list([True, False] * 20))),
    one(CLASSES, "whole floats in Parquet", "a.parquet", parquet([1.0, 2.0] * 20)),
    one(CLASSES, "whole floats in CSV", "a.csv", labelled("1.0", "2.0")),
    one(CLASSES, "other numbers", "a.csv", labelled("1.5", "2.25")),
    one(CLASSES, "categories in Parquet", "a.parquet",
        parquet(pa.array(LABELS).dictionary_encode())),
    one(CLASSES, "lists in Parquet", "a.parquet", parquet([["pos"]] * 40)),
    one(CLASSES, "spaces around labels", "a.csv", labelled("pos", "neg ", " pos")),
    one(CLASSES, "the same, to be kept", "a.csv", labelled("pos", "neg ", " pos", "neg"),
        strip_labels=False),
    one(CLASSES, "`Pos`, `pos` and `neg`", "a.csv", labelled("Pos", "neg", "pos")),
    one(CLASSES, "a class `NA`", "a.csv", labelled("NA", "EU")),
    one(CLASSES, "one class", "a.csv", labelled("pos")),
    one(CLASSES, "an id for each row", "a.csv", table(labels=[f"r{n}" for n in range(40)])),
    two(CLASSES, "numbers in one split, the same as text in the other",
        (".parquet", parquet(["1", "2"] * 20)), (".parquet", parquet([1, 2] * 20))),
    two(CLASSES, "`1.0` in one split, `1` in the other", labelled("1.0", "2.0"),
        labelled(1, 2)),
    two(CLASSES, "a class that only test rows have", table(), with_rows("so so,neutral")),
    two(CLASSES, "a class that is spelled differently in test rows", labelled("a b", "c"),
        labelled("A_b", "c")),
    two(CLASSES, "only -1 in test rows", labelled(0, 1), labelled(-1)),
    one(MISSING, "rows without a text or a label", "a.csv", with_rows(",pos", "x,", ",neg")),
    one(MISSING, "the same, to be left out", "a.csv", with_rows(",pos", "x,", ",neg"),
        missing="drop"),
    one(MISSING, "a text of spaces alone", "a.csv", with_rows("  ,pos")),
    one(MISSING, "null in Parquet", "a.parquet", parquet([*LABELS, None], [*TEXTS, "x"])),
    one(MISSING, "NaN among numbers", "a.csv",
        table([*TEXTS, "x"], [*[1, 2] * 20, "NaN"])),
    one(MISSING, "NaN among floats in Parquet, to be left out", "a.parquet",
        parquet([*[1.0, 2.0] * 20, float("nan")], [*TEXTS, "x"]), missing="drop"),
    one(MISSING, "the text `null`", "a.csv", with_rows("null,pos", "None,neg")),
    one(ROWS, "texts that are numbers", "a.csv", table([f"0{n}" for n in range(40)])),
    one(ROWS, "numbers as texts in Parquet", "a.parquet", parquet(texts=list(range(40)))),
    one(ROWS, "lists as texts", "a.parquet", parquet(texts=[["a"]] * 40)),
    two(ROWS, "the same text twice, and with another label",
        with_rows("good text 1,pos", "good text 2,neg"), "text,label\nx,pos\n"),
    two(ROWS, "texts of training rows in test rows", table(), table()),
    one(ROWS, "a class with few rows", "a.csv",
        with_rows(*(f"so so {n},neutral" for n in range(5)))),
    one(ROWS, "too few rows", "a.csv", "text,label\na,1\nb,2\n"),
)  # fmt: skip


def outcomes() -> list[dict[str, str]]:
    """What happens with all of them."""
    found = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            happens = outcome(case, Path(folder))
            found.append({"group": case.group, "input": case.what, "result": happens})
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(outcomes(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
