"""Play the runs of a comparison, one after the other; what is done stays done. Ours."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from droppeft.comparison.cells import Cell
from droppeft.errors import DroppeftError
from droppeft.federation.folder import CONFIG, RESULT, ROUNDS
from droppeft.federation.run import Interrupted, resume_run, start_run
from droppeft.federation.watcher import Watcher
from droppeft.ledger import read_rows

JSON = "comparison.json"
"""What a comparison leaves: everything about its runs, who may be gone themselves."""


@dataclass(frozen=True)
class Played:
    """What became of a cell.

    Attributes:
        cell: which.
        result: content of its ``result.json``; ``None`` if it failed.
        rows: of its rounds.
        failure: why there is no result.
    """

    cell: Cell
    result: Mapping[str, Any] | None
    rows: Sequence[Mapping[str, Any]]
    failure: str | None


class Audience(Protocol):
    """Who is told how a comparison goes."""

    def begins(self, cell: Cell, number: int, of: int) -> Watcher:
        """It is a cell's turn; what watches its run, if it is still to be played."""

    def done(self, played: Played, wall_s: float | None) -> None:
        """A cell is finished; ``None`` seconds if that was long ago."""


def play(cells: Sequence[Cell], out: Path, audience: Audience) -> list[Played]:
    """Play what has not been played yet; a run that fails does not keep others from theirs.

    Args:
        out: a folder per cell is made in it. What its ``comparison.json`` has of a cell is done,
            so that a comparison can go on elsewhere with this file alone.

    Raises:
        Interrupted: on Ctrl-C; the same call goes on from there.
        DroppeftError: the file is damaged.
    """
    found, earlier = [], _earlier(out)
    for number, cell in enumerate(cells, start=1):
        start, there = time.perf_counter(), _done(cell, out, earlier)
        watcher = audience.begins(cell, number, len(cells))
        found.append(there or _one(cell, out / cell.folder, watcher))
        audience.done(found[-1], None if there else time.perf_counter() - start)
    return found


def done(cells: Sequence[Cell], out: Path) -> list[Played]:
    """Those that have been played in a folder, by whichever process.

    Raises:
        DroppeftError: as :func:`play`.
    """
    earlier = _earlier(out)
    return [there for cell in cells if (there := _done(cell, out, earlier))]


def with_others(own: Sequence[Played], cells: Sequence[Cell], out: Path) -> list[Played]:
    """What was just played and, of the other cells, what was by another call; in their order.

    Raises:
        DroppeftError: as :func:`play`.
    """
    known = {one.cell.folder: one for one in (*done(cells, out), *own)}
    return [known[cell.folder] for cell in cells if cell.folder in known]


def _earlier(out: Path) -> dict[str, Mapping[str, Any]]:
    """Runs with a result in a comparison's file, by the names of their folders."""
    path = out / JSON
    if not path.is_file():
        return {}
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return {run["folder"]: run for run in runs if run["result"] is not None}
    except (ValueError, KeyError, TypeError) as error:
        raise DroppeftError(f"{path} is damaged ({error}); put it right, or away") from None


def _done(cell: Cell, out: Path, earlier: Mapping[str, Mapping[str, Any]]) -> Played | None:
    folder = out / cell.folder
    if (folder / RESULT).is_file():
        return _read(cell, folder)
    run = earlier.get(cell.folder)
    return None if run is None else Played(cell, run["result"], run["rounds"], None)


def _one(cell: Cell, folder: Path, watcher: Watcher) -> Played:
    """Begin or go on; whatever goes wrong is said of this cell."""
    try:
        if (folder / CONFIG).is_file():
            resume_run(folder, watcher)
        else:
            start_run(cell.config, folder, watcher)
    except Interrupted:
        raise
    except Exception as error:
        # Whatever it is, it is this member's: the others get their runs.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return Played(cell, None, read_rows(folder / ROUNDS), reason)
    return _read(cell, folder)


def _read(cell: Cell, folder: Path) -> Played:
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return Played(cell, result, read_rows(folder / ROUNDS), None)
