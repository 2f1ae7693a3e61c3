"""Play the runs of a comparison, one after the other; what is done stays done. Ours."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from droppeft.comparison.grid import Cell
from droppeft.comparison.study_files import (
    STUDY,
    RunRecord,
    as_texts,
    finished,
    of_rounds,
    read_tables,
)
from droppeft.config import as_tree
from droppeft.runs.folder import CONFIG, RESULT, ROUNDS
from droppeft.runs.ledger import read_rows
from droppeft.runs.listener import Listener
from droppeft.server.run import Interrupted, resume_run, start_run


class ProgressListener(Protocol):
    """Who is told how a comparison goes."""

    def begins(self, cell: Cell, number: int, of: int) -> Listener:
        """It is a cell's turn; what watches its run, if it is still to be run."""

    def done(self, record: RunRecord, wall_s: float | None) -> None:
        """A cell is finished; ``None`` seconds if that was long ago."""


def run_cells(cells: Sequence[Cell], out: Path, progress: ProgressListener) -> list[RunRecord]:
    """Run what has not been run yet; a run that fails does not keep others from theirs.

    Args:
        out: a folder per cell is made in it. What its tables have of a cell is done, so that a
            comparison can go on elsewhere with these files alone.

    Raises:
        Interrupted: on Ctrl-C; the same call goes on from there.
        DroppeftError: the tables are damaged.
    """
    found, earlier = [], _earlier(out)
    for number, cell in enumerate(cells, start=1):
        start, there = time.perf_counter(), _done(cell, out, earlier)
        listener = progress.begins(cell, number, len(cells))
        found.append(there or _one(cell, out / cell.folder, listener))
        progress.done(found[-1], None if there else time.perf_counter() - start)
    return found


def done(cells: Sequence[Cell], out: Path) -> list[RunRecord]:
    """Those that have been run in a folder, by whichever process.

    Raises:
        DroppeftError: as :func:`play`.
    """
    earlier = _earlier(out)
    return [there for cell in cells if (there := _done(cell, out, earlier))]


def with_others(own: Sequence[RunRecord], cells: Sequence[Cell], out: Path) -> list[RunRecord]:
    """What was just run and, of the other cells, what was by another call; in their order.

    Raises:
        DroppeftError: as :func:`play`.
    """
    known = {one.folder: one for one in (*done(cells, out), *own)}
    return [known[cell.folder] for cell in cells if cell.folder in known]


def _earlier(out: Path) -> dict[str, RunRecord]:
    """Runs with a result in a comparison's tables, by the names of their folders."""
    if not (out / STUDY).is_file():
        return {}
    return {one.folder: one for one in read_tables(out)[1] if one.result is not None}


def _done(cell: Cell, out: Path, earlier: Mapping[str, RunRecord]) -> RunRecord | None:
    folder = out / cell.folder
    if (folder / RESULT).is_file():
        return _read(cell, folder)
    one = earlier.get(cell.folder)
    # The same run may have another name now, and its data another place.
    return one and replace(one, variant=cell.variant, data=cell.data, model=cell.model)


def _one(cell: Cell, folder: Path, listener: Listener) -> RunRecord:
    """Begin or go on; whatever goes wrong is said of this cell."""
    try:
        if (folder / CONFIG).is_file():
            resume_run(folder, listener)
        else:
            start_run(cell.config, folder, listener)
    except Interrupted:
        raise
    except Exception as error:
        # Whatever it is, it is this variant's: the others get their runs.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return _failed(cell, reason, read_rows(folder / ROUNDS))
    return _read(cell, folder)


def _failed(cell: Cell, reason: str, rows: Sequence[Mapping[str, Any]]) -> RunRecord:
    which = (cell.folder, cell.variant, cell.data, cell.model, cell.seed)
    return RunRecord(*which, as_texts(as_tree(cell.config)), None, of_rounds(rows), [], reason)


def _read(cell: Cell, folder: Path) -> RunRecord:
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return finished(cell.folder, cell.variant, result, read_rows(folder / ROUNDS))
