"""What the folder of a run tells about it, also while the run goes on. Ours."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.quantities import about_minutes, bytes_text, counted, seconds_text
from droppeft.runs.folder import (
    CLIENTS,
    CONFIG,
    RESULT,
    ROUNDS,
    is_locked,
    read_result,
    saved_config,
)
from droppeft.runs.ledger import RoundRow
from droppeft.runs.read_ledger import read_rounds, read_rows
from droppeft.runs.summary import sum_if_all_known
from droppeft.tasks.metrics import Metric, metrics_in

PLACES = ("", "*/", "*/*/")
"""Where runs are looked for: the folder itself, its folders, and those of comparisons in it."""

RECENT_ROUNDS = 5
"""The time left is estimated from this many rounds."""

Stage = Literal["running", "finished", "stopped", "unfinished"]
"""``unfinished``: it cannot be told whether a process works on the run."""


@dataclass(frozen=True)
class RunState:
    """A run as its folder shows it.

    Attributes:
        folder: of the run.
        config: its settings.
        stage: whether it is running, finished or stopped.
        rows: of all rounds so far.
        clients: rows of the last round's clients.
        conclusion: sentences of a finished run.
        changed: when its last round ended, in seconds since 1970; without rounds, when it began.
    """

    folder: Path
    config: Config
    stage: Stage
    rows: Sequence[RoundRow]
    clients: Sequence[Mapping[str, Any]]
    conclusion: Sequence[str]
    changed: float

    @property
    def metric(self) -> Metric | None:
        """The primary metric; ``None`` before the first round."""
        return metrics_in(self.rows[-1].quality)[0] if self.rows else None


def find_runs(folder: Path) -> dict[str, Path]:
    """Return the folders of runs by name, the run that began last first.

    Args:
        folder: of a run, of several runs, or of comparisons with runs. Names are relative to it.

    Raises:
        DroppeftError: it is no folder.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise DroppeftError(
            f"{folder}: {what}; name the folder of your runs, or start a run with: droppeft run"
        )
    found = [path.parent for place in PLACES for path in folder.glob(place + CONFIG)]
    runs = [run for run in found if _is_run(run) and not _is_hidden(run.relative_to(folder))]
    runs.sort(key=lambda run: stamp(run / CONFIG), reverse=True)
    return {_name(run, folder): run for run in runs}


def _is_run(folder: Path) -> bool:
    """Whether a folder with a configuration is that of a run, and not of another program."""
    return (folder / "checkpoints").is_dir() or (folder / RESULT).is_file()


def _is_hidden(path: Path) -> bool:
    """Whether a folder is one in which a new run is being made."""
    return any(part.startswith(".") for part in path.parts)


def _name(run: Path, folder: Path) -> str:
    return run.resolve().name if run == folder else run.relative_to(folder).as_posix()


def stamp(file: Path) -> tuple[float, int]:
    """When a file was changed, in seconds since 1970, and its size; zeros if it does not exist."""
    try:
        found = file.stat()
    except OSError:
        return 0.0, 0
    return found.st_mtime, found.st_size


def stage_of(run: Path) -> Stage:
    """Whether a run is running, finished or stopped, by its result and its lock."""
    if (run / RESULT).is_file():
        return "finished"
    locked = is_locked(run)
    if locked is None:
        return "unfinished"
    return "running" if locked else "stopped"


def read_state(run: Path) -> RunState:
    """Read the state of a run; a last line that is only half written is ignored.

    Raises:
        DroppeftError: a file is damaged, or another version of droppeft wrote it.
    """
    rounds, clients = run / ROUNDS, run / CLIENTS
    # The stage comes first: a run that ends while it is read is shown as running once more.
    stage = stage_of(run)
    rows = _read_rounds(rounds, stamp(rounds))
    last = rows[-1].round if rows else 0
    return RunState(
        folder=run,
        config=_read_config(run, stamp(run / CONFIG)),
        stage=stage,
        rows=rows,
        clients=_clients_of(clients, stamp(clients), last),
        conclusion=read_result(run)["conclusion"] if stage == "finished" else (),
        changed=max(stamp(rounds)[0], stamp(run / CONFIG)[0]),
    )


@lru_cache(maxsize=256)
def _read_config(run: Path, unchanged: tuple[float, int]) -> Config:
    return saved_config(run)


@lru_cache(maxsize=64)
def _read_rounds(path: Path, unchanged: tuple[float, int]) -> tuple[RoundRow, ...]:
    return tuple(read_rounds(path))


@lru_cache(maxsize=64)
def _clients_of(
    path: Path, unchanged: tuple[float, int], round: int
) -> tuple[Mapping[str, Any], ...]:
    return tuple(row for row in read_rows(path) if row["round"] == round)


def sentence(run: RunState) -> str:
    """How far a run is, and about how long it will take or how to go on."""
    done, planned = len(run.rows), run.config.rounds
    of = f"round {done} of {planned}" if done else f"round 1 of {planned}"
    if run.stage == "finished":
        return f"finished after {counted(done, 'round')}"
    if run.stage == "running":
        return _running(run)
    when = f"after {of}" if done else f"in {of}"
    if run.stage == "unfinished":
        return f"not finished, {when}; whether it goes on cannot be told (another user's run)"
    return f"stopped {when}; go on with: droppeft resume {shlex.quote(str(run.folder))}"


def _running(run: RunState) -> str:
    done, planned = len(run.rows), run.config.rounds
    ended = f" (round {done} ended at {_clock(run.changed)})" if done else ""
    if done >= planned:
        return f"the final evaluation goes on{ended}"
    text = f"round {done + 1} of {planned} goes on{ended}"
    recent = [row.host_wall_s for row in run.rows[-RECENT_ROUNDS:]]
    if not recent:
        return text
    left_s = (planned - done) * sum(recent) / len(recent)
    return f"{text}; {about_minutes(left_s)} left for the rounds"


def _clock(seconds: float) -> str:
    """A time of today, or with its date."""
    time = datetime.fromtimestamp(seconds)
    today = time.date() == datetime.now().date()
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M")


def facts(run: RunState) -> list[tuple[str, str]]:
    """Quality and costs so far: names and values."""
    rows, metric = run.rows, run.metric
    if not rows or metric is None:
        return []
    values = [row.quality[metric.key("global")] for row in rows]
    losses = [row.train_loss for row in rows if row.train_loss is not None]
    found = [
        (metric.label, metric.text(next((v for v in reversed(values) if v is not None), None))),
        ("train loss", f"{losses[-1]:.3f}" if losses else "–"),
        ("modelled time", seconds_text(sum_if_all_known([row.round_modelled_s for row in rows]))),
        ("time here", seconds_text(sum(row.host_wall_s for row in rows))),
        ("upload", bytes_text(sum(row.upload_bytes for row in rows))),
        ("download", bytes_text(sum(row.download_bytes for row in rows))),
    ]
    if rows[-1].epsilon is not None:
        found.append(("epsilon", f"{rows[-1].epsilon:.3f}"))
    return found


CLIENT_COLUMNS = ("client", "device", "update", "texts", "steps", "loss", "here", "modelled")
"""Headings of :func:`client_table`."""


def client_table(run: RunState, most: int = 50) -> list[tuple[str, ...]]:
    """What the clients of the last round did, a row for each of the first ``most`` clients."""
    return [_client_cells(row) for row in run.clients[:most]]


def _client_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells of a client; a value that its row lacks, as with differential privacy, is a dash."""
    loss = row.get("train_loss")
    update = bytes_text(row["upload_bytes"]) if "upload_bytes" in row else "–"
    return (
        str(row["client"]),
        row.get("profile", "–"),
        update if row["accepted"] else f"not merged: {row.get('reason', '')}",
        str(row.get("examples", "–")),
        str(row.get("steps", "–")),
        "–" if loss is None else f"{loss:.3f}",
        seconds_text(row.get("total_wall_s")),
        seconds_text(row.get("client_modelled_s")),
    )


ACROSS = ("round", "modelled time", "time here")
"""What curves are drawn over."""


def curve(run: RunState, column: str, across: str) -> list[tuple[float, float]]:
    """Return points of a curve: rounds or seconds, and the value after that round.

    Args:
        run: whose rounds are drawn; those without a value have no point.
        column: ``train_loss``, or the key of a metric as ``global_accuracy``.
        across: one of ``ACROSS``; seconds are added up over the rounds.
    """
    points, elapsed_s = [], 0.0
    for row in run.rows:
        seconds = row.host_wall_s if across == "time here" else row.round_modelled_s
        if seconds is None and across != "round":
            return []
        elapsed_s += seconds or 0.0
        value = row.train_loss if column == "train_loss" else row.quality.get(column)
        if value is not None:
            points.append((float(row.round) if across == "round" else elapsed_s, value))
    return points
