"""Play the runs of a comparison, one after the other; what is done stays done. Ours."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from droppeft.comparison.cells import Cell
from droppeft.federation.folder import CONFIG, RESULT, ROUNDS
from droppeft.federation.run import Interrupted, resume_run, start_run
from droppeft.federation.watcher import Watcher
from droppeft.ledger import read_rows


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
        out: a folder per cell is made in it.

    Raises:
        Interrupted: on Ctrl-C; the same call goes on from there.
    """
    found = []
    for number, cell in enumerate(cells, start=1):
        folder = out / cell.folder
        start, fresh = time.perf_counter(), not (folder / RESULT).is_file()
        watcher = audience.begins(cell, number, len(cells))
        found.append(_one(cell, folder, watcher) if fresh else _read(cell, folder))
        audience.done(found[-1], time.perf_counter() - start if fresh else None)
    return found


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
