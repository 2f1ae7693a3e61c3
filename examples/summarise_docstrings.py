"""Make a data set of summaries without network: the body of a docstring, and its first line.

The docstrings are those of libraries that are installed with droppeft. Each row names its package,
so that every client can have the texts of some packages:

    python examples/summarise_docstrings.py summaries
    droppeft data summaries --show 2
    droppeft run examples/summarise_docstrings.toml data=summaries
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random

LIBRARIES = ("accelerate", "datasets", "joblib", "networkx", "peft", "scipy", "sklearn")
PROMPT = "Summarise this documentation of a Python function in one line.\n\n"
SECTION = re.compile(r"^(?:Args|Arguments|Parameters|Returns|Examples?)\b", re.MULTILINE)
LARGEST_BODY = 600  # characters
ROWS_OF_A_LIBRARY, TEST_ROWS_OF_A_LIBRARY = 300, 25


def summaries(source: str) -> Iterator[tuple[str, str]]:
    """Body and first line of the docstrings of a module's functions and classes."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        first, _, body = (ast.get_docstring(node) or "").partition("\n\n")
        body = SECTION.split(body)[0].strip()
        if "\n" not in first and 20 <= len(first) <= 120 and 100 <= len(body) <= LARGEST_BODY:
            yield body, first


def rows(library: str) -> list[dict[str, str]]:
    """Rows of an installed library, each body once, in an order that is always the same."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        return []
    root = Path(spec.origin).parent
    found = {}
    for file in sorted(one for one in root.rglob("*.py") if "tests" not in one.parts):
        package = "/".join(file.relative_to(root.parent).parts[:2])
        for body, first in summaries(file.read_text(encoding="utf-8", errors="ignore")):
            found[body] = {"prompt": PROMPT + body, "completion": first, "package": package}
    return Random(0).sample(list(found.values()), min(ROWS_OF_A_LIBRARY, len(found)))


def main(folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for library in LIBRARIES:
        of_library = rows(library)
        parts["test"] += of_library[:TEST_ROWS_OF_A_LIBRARY]
        parts["train"] += of_library[TEST_ROWS_OF_A_LIBRARY:]
    for name, part in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{len(part):,} rows in {folder / name}.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "summaries"))
