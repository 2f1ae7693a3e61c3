"""Which deliberate errors in the source the tests notice: those of ``make test``, or only others.

Every mutation of ``mutations.py`` is made in a copy of ``src``. The test files that it names run
there until one fails: first their part of ``make test``, then what is part of ``make test-full``
alone. A row of the table says which of the two noticed the error, and the test
that did. If the text that a mutation replaces is no longer in its file, the row says so.

All tests must pass without a mutation. It takes about ten minutes on two quiet cores. It writes
``study.json`` and ``result.csv.gz`` in its folder; with ``--only WORD`` it runs the mutations whose
description or file contains the word, and keeps the recorded rows of the others.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.test_sample.mutations import MUTATIONS, Mutation

NAME = "test_sample"
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
# They are imported once, in the process from which those of the mutations are forked.
LIBRARIES = ["torch", "transformers", "peft", "datasets", "hypothesis"]
PARTS = {"make test": "not full", "make test-full": "full"}
"""The part of the tests that only this target adds, as a marker expression of pytest."""


class FirstFailure:
    """A plugin of pytest that remembers the first test that failed."""

    def __init__(self) -> None:
        self.test: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test that failed."""
        if report.failed:
            self.test = self.test or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that cannot be imported."""
        if report.failed:
            self.test = self.test or report.nodeid


def first_failure(source: Path, scratch: Path, tests: Sequence[str], part: str) -> str | None:
    """Run tests on a copy of the source until one fails, and return its name, if one does.

    It is called in a process of its own.
    """
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(source)  # of processes that tests start
    sys.path.insert(0, str(source))
    sys.stdout = sys.stderr = (scratch / "output").open("w")
    failure = FirstFailure()
    options = ["-x", "-m", part, "-p", "no:cacheprovider", f"--basetemp={scratch / 'tests'}"]
    pytest.main([*options, *(f"tests/{path}" for path in tests)], plugins=[failure])
    return failure.test


def row_of(mutation: Mutation) -> dict[str, Any]:
    """Run the tests of one mutation, and describe what noticed it."""
    row = {"mutation": mutation.what, "file": mutation.file, "tests": " ".join(mutation.tests)}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source)
        file = source / "droppeft" / mutation.file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if text.count(mutation.old) != 1:
            return {**row, "noticed_by": "text not found", "test": None, "wall_s": 0.0}
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        found = (
            (target, _in_a_process(source, Path(folder), mutation.tests, part))
            for target, part in PARTS.items()
        )
        noticed_by, test = next((pair for pair in found if pair[1]), ("none", None))
    wall_s = round(time.perf_counter() - start, 1)
    return {**row, "noticed_by": noticed_by, "test": test, "wall_s": wall_s}


def _in_a_process(source: Path, scratch: Path, tests: Sequence[str], part: str) -> str | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(first_failure, source, scratch, tests, part).result()


def main() -> None:
    """Run all mutations, or some; print and record the row of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD")
    word = parser.parse_args().only
    os.environ.update(ENVIRONMENT)
    for mutation in MUTATIONS:
        if word in mutation.what or word in mutation.file:
            row = row_of(mutation)
            print(*row.values(), sep=" | ", flush=True)
            _record(row)


def _record(row: dict[str, Any]) -> None:
    """Write the row to the table, and keep the rows of the other mutations."""
    # It imports droppeft, which the process of a mutation must import from the changed source.
    from benchmarks import study

    known = study.read_table(NAME) if study.was_measured(NAME) else []
    by_mutation = {one["mutation"]: one for one in (*known, row)}
    rows = [by_mutation[one.what] for one in MUTATIONS if one.what in by_mutation]
    study.write_table(NAME, "result", rows)
    noticed = Counter(one["noticed_by"] for one in rows)
    content = {**study.about(NAME), "mutations": len(rows), "noticed_by": dict(noticed)}
    study.write_values(NAME, content)


if __name__ == "__main__":
    main()
