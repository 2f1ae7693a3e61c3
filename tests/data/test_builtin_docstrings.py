"""The built-in docstrings, and the script that makes them."""

import ast
import csv
import gzip
import importlib.metadata
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from droppeft.config import SourceConfig
from droppeft.data.builtin import LIBRARIES
from droppeft.data.builtin_docstrings import (
    DOCSTRINGS,
    EXPECTED_HASH,
    REQUEST,
    load_builtin_docstrings,
)
from droppeft.data.conversation_sources import load_conversations
from droppeft.data.conversations import ConversationData, prompt_of, reference_of
from scripts import make_builtin_docstrings as script
from scripts import make_builtin_texts as texts
from scripts.make_builtin_docstrings import Row


@pytest.fixture(scope="module")
def data() -> ConversationData:
    return load_builtin_docstrings()


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with gzip.open(DOCSTRINGS, "rt", encoding="utf-8", newline="") as file:
        return [
            Row(row["signature"], row["docstring"], row["library"], row["file"], row["split"])
            for row in csv.DictReader(file)
        ]


def test_the_file_holds_the_recorded_rows(data: ConversationData) -> None:
    assert data.content_hash == EXPECTED_HASH
    assert f"`{EXPECTED_HASH}`" in (DOCSTRINGS.parent / "NOTICE.md").read_text(encoding="utf-8")
    assert DOCSTRINGS.stat().st_size < 1_000_000


def test_every_library_has_as_many_rows_in_each_part(data: ConversationData) -> None:
    assert data.label_names == LIBRARIES
    assert np.bincount(data.train.labels).tolist() == [script.TRAIN_ROWS] * 8
    assert np.bincount(data.test.labels).tolist() == [script.TEST_ROWS] * 8


def test_a_row_asks_for_the_docstring_of_a_function(data: ConversationData) -> None:
    for row in data.test.rows:
        [asked] = prompt_of(row)
        start, _, signature = asked.content.partition("\n\n")
        assert start == REQUEST
        [node] = ast.parse(f"{signature} ...").body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        assert re.fullmatch(r"[A-Z].{10,}\.", reference_of(row))


def test_no_source_file_is_in_both_parts(rows: list[Row]) -> None:
    assert not set.intersection(
        *({r.file for r in rows if r.split == s} for s in ("train", "test"))
    )


def test_owners_are_packages(data: ConversationData) -> None:
    assert load_conversations("builtin", SourceConfig()).train.keys is None
    owned = load_conversations("builtin", SourceConfig(max_train_rows=500), "package")
    assert set(owned.train.keys or ()) <= set(data.train.keys or ("none",))
    assert owned.test.keys is None
    large = [owner for owner, count in Counter(data.train.keys).items() if count >= 20]
    assert len(large) > 30  # so that a natural partition has many clients


def test_no_docstring_nearly_repeats_another(rows: list[Row]) -> None:
    assert script.drop_near_duplicates(rows) == rows
    assert max(Counter(row.file for row in rows).values()) <= script.ROWS_PER_FILE


def test_rows_are_what_the_script_reads_from_their_files(rows: list[Row]) -> None:
    """On three files of each library that is installed at the version of the rows."""
    for library in texts.LIBRARIES:
        version = importlib.metadata.version(library.distribution).partition("+")[0]
        if version != library.version:
            continue
        folder = texts.source_folder(library.package).parent
        mine = [row for row in rows if row.library == library.package]
        for file in list(dict.fromkeys(row.file for row in mine))[:3]:
            found = {(row.signature, row.docstring) for row in mine if row.file == file}
            assert found <= set(script.functions(folder / file))
            assert texts.other_terms(folder / file, library.in_files) is None


def test_the_bytes_of_the_file_depend_on_the_rows_alone(rows: list[Row]) -> None:
    assert gzip.decompress(script.packed(rows)) == gzip.decompress(DOCSTRINGS.read_bytes())
    assert script.packed(rows[:3])[4:8] == bytes(4)  # the time in the header of gzip


MODULE = '''
@cache
def area(width: float, height=1.0, *, unit: str = "m") -> float:
    """Return the area of a rectangle.

    More.
    """

async def fetch(): "Fetch the next batch of rows."

class Shape:
    """Not a function, so it is left out."""
    def scale(self, by):
        """Scale the shape in place."""
        def inner(): "This one is nested in another."
    def short(self): "Too short."
    def wrapped(self):
        """This goes on
        in a second line."""
    def question(self): "Is this usable or not?"
    def markup(self): "Return the `value` of the shape."
'''


def test_functions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE, encoding="utf-8")
    assert script.functions(path) == [
        (
            "def area(width: float, height=1.0, *, unit: str='m') -> float:",
            "Return the area of a rectangle.",
        ),
        ("async def fetch():", "Fetch the next batch of rows."),
        ("class Shape:\n    def scale(self, by):", "Scale the shape in place."),
    ]
    path.write_text("def broken(", encoding="utf-8")
    assert script.functions(path) == []
