"""What happens with odd files; the same rows are the same data in every format."""

import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droppeft.config import SourceConfig
from droppeft.config.task_detection import columns_of
from droppeft.data.sources import load_text
from odd_inputs import CASES, FILE, Odd, outcome

EXPECTED = {
    (case["group"], case["input"]): case["result"]
    for case in json.loads(FILE.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what.replace(" ", "_"))
def test_what_happens_with_odd_files(case: Odd, tmp_path: Path) -> None:
    """Run python tests/odd_inputs.py to update docs/odd_inputs.json, and read what changed."""
    assert outcome(case, tmp_path) == EXPECTED[case.group, case.what]


def test_all_odd_files_are_in_the_reference() -> None:
    assert list(EXPECTED) == [(case.group, case.what) for case in CASES]


def write(path: Path, texts: Sequence[str], labels: Sequence[Any]) -> None:
    table = pa.table({"text": texts, "label": labels})
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        pa.feather.write_feather(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([("text", "label"), *zip(texts, labels, strict=True)])


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
LABELS = st.one_of(
    st.just((False, True)),
    st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)),
    st.tuples(st.integers(0, 99).map(float), st.integers(0, 99).map(float)),
    st.tuples(TEXT, TEXT),
).filter(lambda pair: len({str(label).strip() for label in pair}) == 2)


@given(texts=st.lists(TEXT, min_size=4, max_size=12), pair=LABELS)
def test_the_same_rows_are_the_same_data_in_every_format(
    texts: list[str], pair: tuple[Any, Any]
) -> None:
    labels = [pair[row % 2] for row in range(len(texts))]
    found = set()
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".arrow"):
            path = Path(folder) / suffix[1:]
            path.mkdir()
            for split in ("train", "test"):
                write(path / f"{split}{suffix}", texts, labels)
            assert tuple(columns_of(path)) == ("text", "label")
            data = load_text(str(path), SourceConfig())
            assert data.train.texts == tuple(texts)
            found.add(data.content_hash)
    assert len(found) == 1
