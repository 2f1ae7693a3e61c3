"""Make the built-in docstrings from eight libraries: signatures, and docstrings' first lines.

    python -m scripts.make_builtin_docstrings

Like ``scripts/make_builtin_texts.py``, whose libraries and rules about licences it shares, it reads
the source files of the installed libraries without importing them. It writes the folder
``src/droppeft/data/builtin_docstrings``. A row is a function or method whose docstring begins with
a paragraph of one line. Near-duplicates are removed, and all rows of a file go to the same split.
"""

import ast
import csv
import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from droppeft.data.builtin_docstrings import COLUMNS, load_builtin_docstrings
from scripts import make_builtin_texts as texts
from scripts.make_builtin_texts import LIBRARIES, Library

FOLDER = texts.FOLDER.parent / "builtin_docstrings"

TRAIN_ROWS, TEST_ROWS = 480, 100
"""Number of rows per library in each split."""

ROWS_PER_FILE = 24
SPARE = 2  # rows to read per row that is used, since near-duplicates are removed
MIN_WORDS, MAX_CHARACTERS = 4, 160  # of a docstring's first line
MAX_SIGNATURE = 400  # characters

_SENTENCE = re.compile(r"[A-Z][^`\n]*[A-Za-z)]\.")  # plain text that ends with a full stop


class Row(NamedTuple):
    """A function. ``file`` is its source file, as ``library/path.py``."""

    signature: str
    docstring: str
    library: str
    file: str
    split: str


def main() -> None:
    """Write the folder of the built-in docstrings."""
    texts.check_versions()
    rows = [row for library in LIBRARIES for row in collect(library)]
    rows = drop_near_duplicates(rows)
    chosen = [*first(rows, "train", TRAIN_ROWS), *first(rows, "test", TEST_ROWS)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "docstrings.csv.gz").write_bytes(packed(chosen))
    notice = notice_text(chosen, load_builtin_docstrings().content_hash)
    (FOLDER / "NOTICE.md").write_text(notice, encoding="utf-8")


def collect(library: Library) -> list[Row]:
    """Return rows of a library until both splits have enough; the first files are for test."""
    wanted_test, wanted = SPARE * TEST_ROWS, SPARE * (TEST_ROWS + TRAIN_ROWS)
    rows: list[Row] = []
    for path, name in texts.source_files(library.package):
        if len(rows) >= wanted:
            break
        if texts.other_terms(path, library.in_files):
            continue
        split = "test" if len(rows) < wanted_test else "train"
        rows += [Row(*function, library.package, name, split) for function in functions(path)]
    return rows


def functions(path: Path) -> list[tuple[str, str]]:
    """Return signature and docstring of the first ``ROWS_PER_FILE`` usable functions of a file."""
    tree = texts.parsed(path)
    described = ((signature, first_line(docstring)) for signature, docstring in _functions(tree))
    usable = (one for one in described if one[1] and len(one[0]) <= MAX_SIGNATURE)
    return list(dict.fromkeys(usable))[:ROWS_PER_FILE]


def _functions(tree: ast.Module | ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yield functions and methods that are not nested in others, in file order."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield signature_of(node), ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            for signature, docstring in _functions(node):
                inner = "\n".join(f"    {line}" for line in signature.splitlines())
                yield f"class {node.name}:\n{inner}", docstring


def signature_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the line ``def name(parameters) -> type:``, without decorators."""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returned}:"


def first_line(docstring: str) -> str:
    """Return the first paragraph if it is a sentence on one line, or else ""."""
    line, _, rest = docstring.strip().partition("\n")
    line = line.strip()
    usable = (
        not rest.partition("\n")[0].strip()
        and len(line) <= MAX_CHARACTERS
        and len(line.split()) >= MIN_WORDS
        and _SENTENCE.fullmatch(line)
    )
    return line if usable else ""


def drop_near_duplicates(rows: Sequence[Row]) -> list[Row]:
    """Remove rows whose docstring shares too many words with that of an earlier row."""
    numbered = [
        texts.Row(row.docstring, row.library, str(number), row.split)
        for number, row in enumerate(rows)
    ]
    return [rows[int(row.file)] for row in texts.drop_near_duplicates(numbered)]


def first(rows: Sequence[Row], split: str, quota: int) -> list[Row]:
    """Return the first rows of every library in a split."""
    return [
        row
        for library in LIBRARIES
        for row in [one for one in rows if (one.library, one.split) == (library.package, split)][
            :quota
        ]
    ]


def packed(rows: Sequence[Row]) -> bytes:
    """Return the rows as a gzipped CSV file, which has the same bytes whenever it is made."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(
        (row.split, row.library, row.file, row.signature, row.docstring) for row in rows
    )
    return gzip.compress(text.getvalue().encode(), mtime=0)


def notice_text(rows: Sequence[Row], content_hash: str) -> str:
    """Return ``NOTICE.md``: where the rows come from, and under which licences."""
    files = Counter(library for library, _ in {(row.library, row.file) for row in rows})
    count = Counter(row.library for row in rows)
    table = "\n".join(
        f"| {each.package} | {each.distribution} {each.version} | {count[each.package]} "
        f"| {files[each.package]} | {each.licence} "
        f"| [{each.distribution}.txt](../builtin_texts/licences/{each.distribution}.txt) |"
        for each in LIBRARIES
    )
    return f"""\
# The built-in docstrings

`docstrings.csv.gz` has {len(rows):,} functions. A row is the signature of a function, with the
class if it is a method, and the first line of its docstring. Every library has {TRAIN_ROWS}
rows for training and {TEST_ROWS} for testing, and a source file has rows in only one of the two.
Signatures are written on one line, without decorators; docstrings are unchanged. The columns are
{", ".join(COLUMNS)}; `file` is the source file.

`scripts/make_builtin_docstrings.py` writes this folder, including this page. The content hash of
the rows is `{content_hash}`.

## Sources and licences

Each row remains under the licence of its library. A source file that states terms of its own is
left out, by the rules of [the built-in texts](../builtin_texts/NOTICE.md), which also have the
texts of the licences.

| library | source | rows | files | licence | its text |
|---|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    main()
