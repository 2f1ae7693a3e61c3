"""Run the cells of a comparison one after the other; finished runs are not repeated. Ours."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from droppeft.client.run_inputs import ReadData, read_data, what_is_read
from droppeft.comparison.grid import Cell
from droppeft.comparison.study_files import (
    STUDY,
    RunRecord,
    as_texts,
    finished,
    read_tables,
    round_columns,
)
from droppeft.config import as_tree, resolve
from droppeft.errors import DroppeftError, Interrupted
from droppeft.runs.folder import CONFIG, RESULT, ROUNDS, read_result
from droppeft.runs.listener import Listener
from droppeft.runs.read_ledger import read_rows
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run


class ProgressListener(Protocol):
    """Is told about the progress of a comparison."""

    def begins(self, cell: Cell, number: int, of: int) -> Listener:
        """A cell is next, number ``number`` of ``of``; return the listener of its run."""

    def done(self, record: RunRecord, wall_s: float | None) -> None:
        """A cell is finished; ``wall_s`` is ``None`` if its run had finished before this call."""


def run_cells(cells: Sequence[Cell], out: Path, progress: ProgressListener) -> list[RunRecord]:
    """Run all cells that have not been run yet; if a run fails, the others are still run.

    Args:
        cells: in this order.
        out: each cell gets a folder in it. A cell with a result in the tables of ``out`` is not
            run again, so a comparison can be continued from these tables alone.
        progress: is told about each cell.

    Raises:
        Interrupted: on Ctrl-C; the same call continues.
        DroppeftError: the tables are damaged, or the data of no cell can be read.
    """
    records, earlier = [], _earlier(out)
    read = _first_data([cell for cell in cells if not _done(cell, out, earlier)])
    for number, cell in enumerate(cells, start=1):
        start, finished_before = time.perf_counter(), _done(cell, out, earlier)
        listener = progress.begins(cell, number, len(cells))
        records.append(finished_before or _run_cell(cell, out / cell.folder, listener, read))
        progress.done(records[-1], None if finished_before else time.perf_counter() - start)
    return records


def done(cells: Sequence[Cell], out: Path) -> list[RunRecord]:
    """Records of the cells that have a result in a folder, whichever process ran them.

    Raises:
        DroppeftError: the tables are damaged.
    """
    earlier = _earlier(out)
    return [record for cell in cells if (record := _done(cell, out, earlier))]


def all_records(new: Sequence[RunRecord], cells: Sequence[Cell], out: Path) -> list[RunRecord]:
    """Records of this call and, for the other cells, of earlier calls; in the order of ``cells``.

    Raises:
        DroppeftError: the tables are damaged.
    """
    known = {record.folder: record for record in (*done(cells, out), *new)}
    return [known[cell.folder] for cell in cells if cell.folder in known]


def _first_data(cells: Sequence[Cell]) -> ReadData | None:
    """Read the first data that can be read, for all runs on them; ``None`` if there are no cells.

    Raises:
        DroppeftError: no cell's data can be read; this would be the error of each run.
    """
    errors: dict[tuple[Any, ...], DroppeftError] = {}
    for config in (resolve(cell.config, cuda=True) for cell in cells):
        if (what := what_is_read(config)) not in errors:
            try:
                return read_data(config)
            except DroppeftError as error:
                errors[what] = error
    if errors:
        raise next(iter(errors.values()))
    return None


def _earlier(out: Path) -> dict[str, RunRecord]:
    """Runs that have a result in a comparison's tables, by folder."""
    if not (out / STUDY).is_file():
        return {}
    return {one.folder: one for one in read_tables(out)[1] if one.result is not None}


def _done(cell: Cell, out: Path, earlier: Mapping[str, RunRecord]) -> RunRecord | None:
    folder = out / cell.folder
    if (folder / RESULT).is_file():
        return _read(cell, folder)
    record = earlier.get(cell.folder)
    # The variant may have been renamed since, and the data moved.
    return record and replace(record, variant=cell.variant, data=cell.data, model=cell.model)


def _run_cell(cell: Cell, folder: Path, listener: Listener, read: ReadData | None) -> RunRecord:
    """Start or resume a cell's run; an error becomes the failure of this cell."""
    try:
        if (folder / CONFIG).is_file():
            resume_run(folder, listener)
        else:
            start_run(cell.config, folder, listener, read=read)
    except Interrupted:
        raise
    except Exception as error:
        # Any error concerns this variant alone: the other cells are still run.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return _failed(cell, reason, read_rows(folder / ROUNDS))
    return _read(cell, folder)


def _failed(cell: Cell, reason: str, rows: Sequence[Mapping[str, Any]]) -> RunRecord:
    return RunRecord(
        folder=cell.folder,
        variant=cell.variant,
        data=cell.data,
        model=cell.model,
        seed=cell.seed,
        settings=as_texts(as_tree(cell.config)),
        result=None,
        rows=round_columns(rows),
        clients=[],
        failure=reason,
    )


def _read(cell: Cell, folder: Path) -> RunRecord:
    result = read_result(folder)
    if cell.config.start_from is not None:
        result["config"]["start_from"] = cell.config.start_from  # as it was given
    record = finished(cell.folder, cell.variant, result, read_rows(folder / ROUNDS))
    return replace(record, data=cell.data, model=cell.model)
