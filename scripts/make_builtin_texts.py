"""Make the built-in texts from the docstrings of eight libraries.

    python scripts/make_builtin_texts.py

It reads the source files of the installed libraries without importing them, and writes the folder
``src/droppeft/data/builtin_texts``: the texts, the licences of the libraries and ``NOTICE.md``. A
text is the first paragraph of a docstring. Names and common aliases of the libraries are masked,
near-duplicates are removed, and all texts of a file go to the same split.
"""

import ast
import csv
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from droppeft.data.builtin import COLUMNS, load_builtin


class Library(NamedTuple):
    """A library whose docstrings are read.

    Attributes:
        package: the class of the texts.
        distribution: the name of the library on the package index.
        version: the only version that is accepted.
        licence: the licence of the library.
        in_files: how its source files name this licence, if they do.
    """

    package: str
    distribution: str
    version: str
    licence: str
    in_files: str = ""


LIBRARIES = (
    Library("matplotlib", "matplotlib", "3.11.2", "Matplotlib licence (based on the PSF licence)"),
    Library("networkx", "networkx", "3.6.1", "BSD-3-Clause"),
    Library("pandas", "pandas", "3.1.1", "BSD-3-Clause"),
    Library("scipy", "scipy", "1.17.1", "BSD-3-Clause"),
    Library("sklearn", "scikit-learn", "1.9.1", "BSD-3-Clause"),
    Library("sympy", "sympy", "1.14.0", "BSD-3-Clause"),
    Library("torch", "torch", "2.13.0", "BSD-3-Clause", "licensed under the BSD-style license"),
    Library(
        "transformers",
        "transformers",
        "5.23.0",
        "Apache-2.0",
        "Licensed under the Apache License, Version 2.0",
    ),
)
"""numpy is left out, since much of its documentation is not in docstrings."""

FOLDER = Path(__file__).parents[1] / "src" / "droppeft" / "data" / "builtin_texts"

TRAIN_ROWS, TEST_ROWS = 500, 125
"""Number of rows per library in each split."""

MIN_WORDS = 8
TEXTS_PER_FILE = 24
MAX_FILE_BYTES = 150_000  # larger files take long to parse and yield few paragraphs
SPARE = 1.75  # paragraphs to read per row, since near-duplicates are removed
SAME_WORDS = 0.6  # near-duplicates: Jaccard similarity of the word sets is at least this
MASK = "LIB"
HEADER_LINES = 60  # where a source file states its licence

_SKIPPED = re.compile(
    r"(^|/)(_?tests?|_?testing|conftest\.py|test_[^/]*|benchmarks|externals?|_?vendor(ed)?|extern"
    r"|third_party|array_api_compat|array_api_extra|_lib|_numpy)(/|$)"
)
_OTHER_TERMS = re.compile(
    r"licensed under (?:(?:[\w-]+ ){1,6}?licen[sc]e|\S+)"
    r"|SPDX-License-Identifier: (?!BSD-3-Clause)\S+"
    r"|redistribution and use in source and binary forms|permission is hereby granted"
    r"|creative commons[^<]*|CC[- ]BY[\w.-]*|(?:PSF|MIT|research|community) license"
    r"|BSD 2-clause license|\b[AL]?GPL\w*|original license: \S+|licence at \S+"
    r"|__license__ = \S+",
    re.IGNORECASE,
)
_BUNDLED = re.compile(r"\n-{4,}\s+This binary dist")  # what follows is about compiled libraries
_NAMES = (
    "torch|transformers|hugging ?face|numpy|scipy|scikit|sklearn|pandas|matplotlib|sympy|networkx"
    "|mplot|mpmath"
)
_ALIASES = "np|pd|plt|nx|mpl|hf|pyplot|ndarrays?|dataframes?"
_LIBRARY_NAME = re.compile(rf"[\w.\-]*({_NAMES})[\w.\-]*|\b({_ALIASES})\b(\.\w+)*", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{2,}")
_URL = re.compile(r"\w+://\S+")
_ROLE = re.compile(r":[\w:]+:(?=`)")
_MARKUP = re.compile(r"[`*\[\]~|]+")
_SECTION = r"(?:args|arguments|parameters|attributes|returns|raises|yields|notes?|examples?)\s*"
_PARAGRAPH_END = re.compile(rf"\n\s*\n|\n\s*{_SECTION}:?\s*\n", re.IGNORECASE)
_NOT_PROSE = re.compile(
    rf">>>|\.\. |:|[-=]{{3}}|{_SECTION}(?::|\n|$)|\S+ ?\(.*(?:\boptional|\bof shape|\) ?:)",
    re.IGNORECASE,
)


class Row(NamedTuple):
    """A text. ``file`` is its source file, as ``library/path.py``."""

    text: str
    library: str
    file: str
    split: str


class Collected(NamedTuple):
    """The texts of the libraries, and the files that were left out, each with its other terms."""

    rows: list[Row]
    left_out: dict[str, str]


def main() -> None:
    """Write the folder of the built-in texts."""
    check_versions()
    collected = Collected([], {})
    for library in LIBRARIES:
        collect(library, collected)
    rows = drop_near_duplicates(collected.rows)
    chosen = [*_first(rows, "train", TRAIN_ROWS), *_first(rows, "test", TEST_ROWS)]
    licences = FOLDER / "licences"
    licences.mkdir(parents=True, exist_ok=True)
    (FOLDER / "texts.csv.gz").write_bytes(packed(chosen))
    for library in LIBRARIES:
        path = licences / f"{library.distribution}.txt"
        path.write_text(licence_text(library), encoding="utf-8")
    notice = notice_text(chosen, collected.left_out, load_builtin().content_hash)
    (FOLDER / "NOTICE.md").write_text(notice, encoding="utf-8")


def check_versions() -> None:
    """Exit with a message unless every library is installed at the version in ``LIBRARIES``."""
    for library in LIBRARIES:
        try:
            # A local part such as +cpu names a build of the same source files.
            found = importlib.metadata.version(library.distribution).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != library.version:
            sys.exit(
                f"The built-in texts come from {library.distribution} {library.version}; installed "
                f"is {found}. Run: pip install {library.distribution}=={library.version}"
            )


def collect(library: Library, into: Collected) -> None:
    """Add texts of a library until both splits have enough; the first files are for test."""
    wanted_test, wanted = SPARE * TEST_ROWS, SPARE * (TEST_ROWS + TRAIN_ROWS)
    rows = 0
    for path, name in source_files(library.package):
        if terms := other_terms(path, library.in_files):
            into.left_out[name] = terms
            continue
        split = "test" if rows < wanted_test else "train"
        texts = paragraphs(path)
        into.rows.extend(Row(text, library.package, name, split) for text in texts)
        rows += len(texts)
        if rows >= wanted:
            return


def source_files(package: str) -> list[tuple[Path, str]]:
    """Return the library's modules and their names, in the same order on every machine."""
    root = source_folder(package)
    names = (f"{package}/{path.relative_to(root).as_posix()}" for path in root.rglob("*.py"))
    chosen = sorted((name for name in names if not _SKIPPED.search(name)), key=_digest)
    paths = ((root.parent / name, name) for name in chosen)
    return [(path, name) for path, name in paths if path.stat().st_size <= MAX_FILE_BYTES]


def source_folder(package: str) -> Path:
    """The folder of a package's source files."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(package)
    return Path(spec.submodule_search_locations[0])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def other_terms(path: Path, licence_of_library: str) -> str | None:
    """Return the words with which a file states terms of its own; ``None`` if there are none.

    Such a file is left out, since its texts are not under the licence of the library alone.

    Args:
        path: the source file.
        licence_of_library: how files of this library name the library's licence; "" if they do not.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[:HEADER_LINES]
    header = " ".join(" ".join(lines).replace("#", " ").split())
    found = _OTHER_TERMS.search(header.replace(licence_of_library, ""))
    return found.group().strip() if found else None


def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a source file, an empty one if the file cannot be parsed."""
    with warnings.catch_warnings():  # about invalid escapes in the libraries' strings
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            return ast.parse("")


def paragraphs(path: Path) -> list[str]:
    """Return the first ``TEXTS_PER_FILE`` texts of a source file."""
    tree = parsed(path)
    openings = (opening_paragraph(docstring) for docstring in _docstrings(tree))
    return list(dict.fromkeys(text for text in openings if text))[:TEXTS_PER_FILE]


def _docstrings(tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Yield docstrings of classes, methods and functions (not nested ones) in file order."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            yield from _docstrings(node)


def opening_paragraph(docstring: str) -> str:
    """Return the masked first paragraph on one line; "" if it is too short or not prose."""
    paragraph = _PARAGRAPH_END.split(docstring.strip(), maxsplit=1)[0]
    if _NOT_PROSE.match(paragraph):
        return ""
    plain = _MARKUP.sub("", _ROLE.sub("", _URL.sub("", paragraph)))
    text = " ".join(_LIBRARY_NAME.sub(MASK, plain).split())
    return text if len(_WORD.findall(text)) >= MIN_WORDS else ""


def drop_near_duplicates(rows: Sequence[Row]) -> list[Row]:
    """Remove each row that shares too many words with an earlier row that is not removed.

    Word counts are integers, so the result does not depend on rounding.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(binary=True, dtype=np.int32, stop_words="english")
    words = counter.fit_transform([row.text for row in rows])
    sizes = np.asarray(words.sum(axis=1)).ravel()
    shared = (words @ words.T).tocsr()
    dropped = np.zeros(len(rows), bool)
    for row in range(len(rows)):
        start, end = shared.indptr[row], shared.indptr[row + 1]
        others, common = shared.indices[start:end], shared.data[start:end]
        alike = common >= SAME_WORDS * (sizes[row] + sizes[others] - common)
        dropped[row] = bool(np.any(alike & (others < row) & ~dropped[others]))
    return [row for row, gone in zip(rows, dropped, strict=True) if not gone]


def _first(rows: Sequence[Row], split: str, quota: int) -> list[Row]:
    """The first rows of every library in a split."""
    return [row for library in LIBRARIES for row in _of(library.package, split, rows)[:quota]]


def _of(package: str, split: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if (row.library, row.split) == (package, split)]


def packed(rows: Sequence[Row]) -> bytes:
    """Return the rows as a gzipped CSV file, which has the same bytes whenever it is made."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((row.split, row.library, row.file, row.text) for row in rows)
    return gzip.compress(text.getvalue().encode(), mtime=0)


def licence_text(library: Library) -> str:
    """Return a library's licence, without those of the compiled libraries in its wheel."""
    files = importlib.metadata.files(library.distribution) or []
    names = ("LICENSE", "LICENSE.txt", "COPYING")
    found = [file for file in files if file.name in names and ".dist-info" in str(file)]
    [file] = [each for each in found if len(each.parts) == min(len(one.parts) for one in found)]
    return _BUNDLED.split(file.read_text(encoding="utf-8"))[0].rstrip() + "\n"


def notice_text(rows: Sequence[Row], left_out: dict[str, str], content_hash: str) -> str:
    """Return ``NOTICE.md``: where the texts come from, and under which licences."""
    files = Counter(library for library, _ in {(row.library, row.file) for row in rows})
    table = "\n".join(
        f"| {each.package} | {each.distribution} {each.version} | {files[each.package]} "
        f"| {each.licence} | [licences/{each.distribution}.txt](licences/{each.distribution}.txt) |"
        for each in LIBRARIES
    )
    skipped = "\n".join(f"| `{file}` | {terms} |" for file, terms in left_out.items())
    return f"""\
# The built-in texts

`texts.csv.gz` has {len(rows):,} texts. A text is the first paragraph of a docstring, and its class
is the library that the docstring comes from. Every library has {TRAIN_ROWS} rows for training and
{TEST_ROWS} for testing. The texts are modified: names and common aliases of the libraries are
replaced by `{MASK}`, markup and URLs are removed, and each text is on one line. The columns are
{", ".join(COLUMNS)}; `file` is the source file.

`scripts/make_builtin_texts.py` writes this folder, including this page. The content hash of the
texts is `{content_hash}`.

## Sources and licences

Each text remains under the licence of its library.

| class | source | files | licence | its text |
|---|---|---|---|---|
{table}

The texts of the licences are those of the installed packages, without the parts about compiled
libraries in their wheels.

## Files left out

A source file is left out if its first {HEADER_LINES} lines state terms of its own, even where these
resemble the terms of the library. These files were left out:

| file | words found in it |
|---|---|
{skipped}

## The earlier selection

Before these files were left out, the content hash was `ea4154ffc3b9c770`. Results recorded with the
earlier selection cannot be compared with those of this one;
`docs/decisions/0012-built-in-texts-and-dependencies.md` says how many texts differ.
"""


if __name__ == "__main__":
    main()
