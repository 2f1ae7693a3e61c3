"""What is read from a generated file is what was written, or the file is refused."""

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import SourceConfig
from droppeft.data.sources import load_text
from refusals import or_refused

Row = tuple[str, str]
"""A text and a label."""

ODD = "aB9 ,;|\"'\n\t\\é漢😀\u200b\u0301\u2028\u00a0ﬁ[#{%$<_-="
WORDS = ["NA", "nan", "None", "null", "true", "0", "1", "01", "1.0", "-1", "1e5", "2024-01-01"]

# Python's csv does not quote a single carriage return, which then ends a line.
characters = st.sampled_from(ODD) | st.characters(
    exclude_categories=["Cs"], exclude_characters="\0\r"
)
values = (st.sampled_from(WORDS) | st.text(characters, max_size=12)).filter(str.strip)


def delimited(rows: list[Row], separator: str, encoding: str, end: str, quoting: int) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerows([("text", "label"), *rows])
    return file.getvalue().encode(encoding)


def json_lines(rows: list[Row], ascii_only: bool) -> bytes:
    lines = (
        json.dumps({"text": text, "label": label}, ensure_ascii=ascii_only) for text, label in rows
    )
    return "".join(f"{line}\n" for line in lines).encode()


def columns(rows: list[Row]) -> pa.Table:
    texts, labels = zip(*rows, strict=True)
    return pa.table({"text": pa.array(texts, pa.string()), "label": pa.array(labels, pa.string())})


def parquet(rows: list[Row]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(columns(rows), file)
    return file.getvalue()


def arrow(rows: list[Row]) -> bytes:
    file = io.BytesIO()
    pyarrow.feather.write_feather(columns(rows), file)
    return file.getvalue()


Writer = tuple[str, Callable[[list[Row]], bytes]]
"""An ending, and what writes the file."""

delimited_files = st.builds(
    lambda separator, *rest: (
        "tsv" if separator == "\t" else "csv",
        lambda rows: delimited(rows, separator, *rest),
    ),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
writers: st.SearchStrategy[Writer] = delimited_files | st.sampled_from(
    [
        ("jsonl", lambda rows: json_lines(rows, True)),
        ("jsonl", lambda rows: json_lines(rows, False)),
        ("parquet", parquet),
        ("feather", arrow),
    ]
)


tables = st.builds(
    lambda texts, labels: [(text, labels[row % len(labels)]) for row, text in enumerate(texts)],
    st.lists(values, min_size=9, max_size=9),
    st.lists(values.map(str.strip), min_size=2, max_size=3, unique=True),
)


@given(tables, writers)
def test_what_is_read_was_written(rows: list[Row], writer: Writer) -> None:
    check(rows, writer)


def check(rows: list[Row], writer: Writer) -> None:
    ending, write = writer
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "test"):
            (Path(folder) / f"{split}.{ending}").write_bytes(write(rows))
        with or_refused("label is (missing|-1)|text is missing"):
            data = load_text(folder, SourceConfig())
            for table in (data.train, data.test):
                found = [data.label_names[index] for index in table.labels]
                assert list(zip(table.texts, found, strict=True)) == rows
