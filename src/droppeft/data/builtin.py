"""The built-in task: name the Python library from which a docstring's first paragraph comes.

Ours. The text is in every installation, since it is read from the source files of libraries that
droppeft depends on, without importing them. Names and common aliases of the libraries are masked,
and near-duplicates are removed. All paragraphs of a file go to the same split.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from droppeft.data.cache import store
from droppeft.data.texts import TextData, TextTable
from droppeft.errors import DroppeftError

LIBRARIES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
"""By package, the name of its distribution. The packages are the classes.

numpy is left out, since much of its documentation is not in docstrings.
"""

TRAIN_ROWS, TEST_ROWS = 500, 125
"""Number of rows per library in each split."""

RECIPE = 1
"""Version of the text processing in this module; part of the cache's key."""

EXPECTED_HASH = "ea4154ffc3b9c770"
"""``content_hash`` with the library versions that pyproject.toml pins. If it differs, the texts
differ, and results cannot be compared."""

MIN_WORDS = 8
TEXTS_PER_FILE = 24
MAX_FILE_BYTES = 150_000  # larger files take long to parse and yield few paragraphs
SPARE = 1.75  # paragraphs to read per row, since near-duplicates are removed
SAME_WORDS = 0.6  # near-duplicates: Jaccard similarity of the word sets is at least this
MASK = "LIB"

_SKIPPED = re.compile(
    r"(^|/)(_?tests?|_?testing|conftest\.py|test_[^/]*|benchmarks|externals?|_?vendor(ed)?|extern"
    r"|third_party|array_api_compat|array_api_extra|_lib|_numpy)(/|$)"
)
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
    """A paragraph. ``file`` is its source file, as ``library/path.py``."""

    text: str
    library: str
    file: str
    split: str


def load_builtin(cache: Path) -> TextData:
    """Load the built-in task: 5,000 rows, with equally many for every library.

    ``keys`` of both tables are the rows' source files. The first call reads about 2,200 files in
    about ten seconds and caches the result; later calls read the cache, unless it is damaged. If
    ``content_hash`` equals ``EXPECTED_HASH``, the texts are those of the pinned versions.

    Raises:
        DroppeftError: if a library is not installed.
    """
    cached = cached_builtin(cache)
    if cached is not None:
        return cached
    data = build()
    store(_cache_file(cache), _serialise(data))
    return data


def cached_builtin(cache: Path) -> TextData | None:
    """Load the built-in task from the cache; ``None`` if it is not there or damaged."""
    return _read_cache(_cache_file(cache))


def build() -> TextData:
    """Build the task from the libraries' source files, without the cache."""
    collected = [row for library in LIBRARIES for row in _collect(library)]
    rows = drop_near_duplicates(collected)
    return TextData(
        name="builtin",
        train=_table(_first(rows, "train", TRAIN_ROWS)),
        test=_table(_first(rows, "test", TEST_ROWS)),
        label_names=tuple(LIBRARIES),
    )


def _collect(library: str) -> Iterator[Row]:
    """Yield paragraphs of a library until both splits have enough; the first files are for test."""
    wanted_test, wanted = SPARE * TEST_ROWS, SPARE * (TEST_ROWS + TRAIN_ROWS)
    rows = 0
    for path, name in _files(library):
        split = "test" if rows < wanted_test else "train"
        texts = _paragraphs(path)[:TEXTS_PER_FILE]
        yield from (Row(text, library, name, split) for text in texts)
        rows += len(texts)
        if rows >= wanted:
            return


def _files(library: str) -> list[tuple[Path, str]]:
    """Return the library's modules and their names, in the same order on every machine."""
    root = _root(library)
    names = (f"{library}/{path.relative_to(root).as_posix()}" for path in root.rglob("*.py"))
    chosen = sorted((name for name in names if not _SKIPPED.search(name)), key=_digest)
    paths = ((root.parent / name, name) for name in chosen)
    return [(path, name) for path, name in paths if path.stat().st_size <= MAX_FILE_BYTES]


def _root(library: str) -> Path:
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise DroppeftError(
            f"the built-in data set is made from the source of {library}, which is not installed; "
            f"pip install {LIBRARIES[library]}, or set data to another data set"
        )
    return Path(spec.submodule_search_locations[0])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _paragraphs(path: Path) -> list[str]:
    with warnings.catch_warnings():  # about invalid escapes in the libraries' strings
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            return []
    openings = (opening_paragraph(docstring) for docstring in _docstrings(tree))
    return list(dict.fromkeys(text for text in openings if text))


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
    candidates = [row for row in rows if row.split == split]
    return [row for library in LIBRARIES for row in _of(library, candidates)[:quota]]


def _of(library: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.library == library]


def _table(rows: Sequence[Row]) -> TextTable:
    index = {library: number for number, library in enumerate(LIBRARIES)}
    return TextTable(
        texts=tuple(row.text for row in rows),
        pairs=None,
        labels=np.array([index[row.library] for row in rows], np.int64),
        keys=tuple(row.file for row in rows),
    )


def _cache_file(cache: Path) -> Path:
    return cache / f"builtin-{_versions_key()}.json"


def _versions_key() -> str:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES.values()}
    return _digest(json.dumps([RECIPE, versions]))[:16]


def _serialise(data: TextData) -> bytes:
    parts = {split: _as_json(getattr(data, split)) for split in ("train", "test")}
    return json.dumps({"hash": data.content_hash, **parts}).encode()


def _as_json(table: TextTable) -> dict[str, Any]:
    return {"texts": table.texts, "labels": table.labels.tolist(), "keys": table.keys}


def _read_cache(path: Path) -> TextData | None:
    """Read the cached task; ``None`` if there is none or it is damaged."""
    try:
        content = json.loads(path.read_bytes())
        train, test = (_from_json(content[split]) for split in ("train", "test"))
        data = TextData("builtin", train, test, tuple(LIBRARIES))
        return data if data.content_hash == content["hash"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_json(table: dict[str, Any]) -> TextTable:
    labels = np.array(table["labels"], np.int64)
    return TextTable(tuple(table["texts"]), None, labels, tuple(table["keys"]))


def package_of(file: str) -> str:
    """Return the owner of a built-in row: ``torch/nn`` for ``torch/nn/modules/linear.py``."""
    return "/".join(file.split("/")[:2])
