"""The script that makes the built-in texts, on small inputs and on files of the libraries."""

import csv
import gzip
import importlib.metadata
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from droppeft.data.builtin import LIBRARIES as CLASSES
from droppeft.data.builtin import TEXTS
from scripts import make_builtin_texts as script
from scripts.make_builtin_texts import LIBRARIES, Row, drop_near_duplicates, opening_paragraph


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with gzip.open(TEXTS, "rt", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    return [Row(row["text"], row["library"], row["file"], row["split"]) for row in table]


def test_the_libraries_are_the_classes() -> None:
    assert tuple(library.package for library in LIBRARIES) == CLASSES


def test_texts_are_what_the_script_reads_from_their_files(rows: list[Row]) -> None:
    """On three files of each library that is installed at the version of the texts."""
    by_file: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_file[row.file].append(row.text)
    for library in LIBRARIES:
        if importlib.metadata.version(library.distribution).partition("+")[0] != library.version:
            continue
        folder = script.source_folder(library.package).parent
        for file in [name for name in by_file if name.startswith(f"{library.package}/")][:3]:
            assert set(by_file[file]) <= set(script.paragraphs(folder / file))
            assert script.other_terms(folder / file, library.in_files) is None


def test_the_bytes_of_the_file_depend_on_the_rows_alone(rows: list[Row]) -> None:
    assert gzip.decompress(script.packed(rows)) == gzip.decompress(TEXTS.read_bytes())
    assert script.packed(rows[:3]) == script.packed(rows[:3])
    assert script.packed(rows[:3])[4:8] == bytes(4)  # the time in the header of gzip


def test_no_file_gives_more_than_its_share(rows: list[Row]) -> None:
    [(_, most)] = Counter(row.file for row in rows).most_common(1)
    assert most <= script.TEXTS_PER_FILE


def test_no_near_duplicates_remain(rows: list[Row]) -> None:
    assert drop_near_duplicates(rows) == rows


def test_another_version_of_a_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {library.distribution: library.version for library in LIBRARIES}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    versions["torch"] += "+cu130"
    script.check_versions()
    versions["sympy"] = "1.13.3"
    with pytest.raises(SystemExit, match=r"sympy 1.14.0; installed is 1.13.3. Run: pip install "):
        script.check_versions()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("# Licensed under the Apache License, Version 2.0 (the License)", None),
        ("# Licensed under the Sapiens2 License. You may", "Licensed under the Sapiens2 License"),
        ("# Redistribution and use in source\n# and binary forms, with", "Redistribution and use"),
        ("# released under the Creative Commons\n# Attribution", "Creative Commons Attribution"),
        ("# License: PSF License version 2", "PSF License"),
        ("# SPDX-License-Identifier: GPL-3.0-only", "SPDX-License-Identifier: GPL-3.0-only"),
        ("# the model is under CC-BY-NC-4.0", "CC-BY-NC-4.0"),
        ("# Llama Community License", "Community License"),
        ("# Copyright 2024 Someone. All rights reserved.", None),
        ('"""A module."""' + "\n" * 80 + "# the MIT License", None),
    ],
)
def test_files_with_terms_of_their_own_are_found(
    tmp_path: Path, header: str, expected: str | None
) -> None:
    path = tmp_path / "module.py"
    path.write_text(header, encoding="utf-8")
    found = script.other_terms(path, "Licensed under the Apache License, Version 2.0")
    assert (found or "").startswith(expected or "")
    assert (found is None) == (expected is None)


def test_a_licence_of_another_library_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("# Licensed under the Apache License, Version 2.0", encoding="utf-8")
    assert script.other_terms(path, "") == "Licensed under the Apache License"


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
