"""Run a comparison in a folder, and write its data and tables there. Ours."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from droppeft.comparison.grid import Cell
from droppeft.comparison.runner import ProgressListener, all_records, run_cells
from droppeft.comparison.study_files import RunRecord, Study
from droppeft.comparison.summary import Part, summary
from droppeft.comparison.writers import write


@dataclass(frozen=True)
class Compared:
    """What one call ran, and what the comparison has so far.

    Attributes:
        records: the runs of this call, also those that had finished before.
        parts: summary of all runs in the folder, those of other calls included.
    """

    records: Sequence[RunRecord]
    parts: Sequence[Part]

    @property
    def failed(self) -> bool:
        """Whether a run of this call has no result."""
        return any(record.result is None for record in self.records)


def compare_in_folder(
    study: Study,
    cells: Sequence[Cell],
    seeds: Collection[int] | None,
    folder: Path,
    progress: ProgressListener,
) -> Compared:
    """Run cells that have not been run yet; write tables of all runs that the folder has.

    Args:
        study: what is written beside the tables.
        cells: all runs of the comparison.
        seeds: run only these; ``None`` for all.
        folder: new, or one in which the comparison is continued.
        progress: is told about each run.

    Raises:
        Interrupted: on Ctrl-C; the same call continues.
        DroppeftError: the folder's tables are damaged.
        OSError: a file cannot be written.
    """
    chosen = [cell for cell in cells if seeds is None or cell.seed in seeds]
    records = run_cells(chosen, folder, progress)
    every = all_records(records, cells, folder)
    parts = summary(study, every)
    write(folder, study, every, parts)
    return Compared(records, parts)
