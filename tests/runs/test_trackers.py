"""Rounds in a tracker: what the ledger says, offline, in the run's folder."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import accelerate.tracking
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.server import run
from droppeft.runs import trackers
from droppeft.server.run import resume_run, start_run
from droppeft.runs.trackers import FOLDER
from runs import Recorder, adapter_bytes, rows_of, stop_after_a_round

TRACKER = "tracker=tensorboard"


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """By name and step, from all event files of a run."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted((out / FOLDER).rglob("events.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            places = found.setdefault(name, {})
            places |= {event.step: event.value for event in events.Scalars(name)}
    return found


def assert_rows_are_there(out: Path, rounds: int) -> None:
    written, rows = scalars(out), rows_of(out / "rounds.jsonl")
    assert len(rows) == rounds
    for name in ("global_accuracy", "train_loss", "upload_bytes", "round_modelled_s"):
        expected = {row["round"]: pytest.approx(row[name]) for row in rows}
        assert written[name] == expected, name


def test_every_round_is_in_the_tracker(
    tiny_words: list[str], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = start_run(load_config(None, [*tiny_words, TRACKER]), out, Recorder())
    assert_rows_are_there(out, result["rounds"])
    final = scalars(out)["final_global_accuracy"]
    assert final == {result["rounds"]: pytest.approx(result["global_accuracy"])}
    assert adapter_bytes(out) == adapter_bytes(whole_run)


def test_the_environment_is_as_it_was(tiny_words: list[str], tmp_path: Path) -> None:
    """The next run of a process has its own folder."""
    before = dict(os.environ)
    start_run(load_config(None, [*tiny_words, TRACKER]), tmp_path / "run", Recorder())
    assert dict(os.environ) == before


def test_a_run_that_fails_closes_its_tracker(
    tiny_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(trackers.Tracked, "close", lambda self: closed.append(True))

    class StateLost(Recorder):
        def round_done(self, row: Any) -> None:
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        start_run(load_config(None, [*tiny_words, TRACKER]), tmp_path / "run", StateLost())
    assert closed == [True]


def test_a_resumed_run_goes_on_in_the_tracker(tiny_words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop_after_a_round([*tiny_words, TRACKER], out)
    result = resume_run(out, Recorder())
    assert_rows_are_there(out, result["rounds"])


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tiny_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> Any:
        return None

    monkeypatch.setattr(trackers.importlib.util, "find_spec", nothing)
    with pytest.raises(DroppeftError, match="tracker=mlflow needs the package mlflow; run: pip"):
        start_run(load_config(None, [*tiny_words, "tracker=mlflow"]), tmp_path / "r", Recorder())
    assert not (tmp_path / "r").exists()


class Noting:
    """Stands for accelerate's trackers: what they are opened with, and the run they then have."""

    opened: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, project: str, **options: Any) -> None:
        self.opened.append(options)
        found = options.get("run_id") or f"run {len(self.opened)}"
        self.active_run = SimpleNamespace(info=SimpleNamespace(run_id=found))

    def start(self) -> None: ...
    def store_init_configuration(self, settings: Any) -> None: ...
    def log(self, numbers: Any, step: int) -> None: ...
    def finish(self) -> None: ...


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("mlflow", "run_id")])
def test_a_resumed_run_is_the_same_run_there(
    name: str, key: str, tiny_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, Noting)
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    monkeypatch.setattr(run, "check_tracker", lambda name: None)
    monkeypatch.setattr(Noting, "opened", [])
    out = tmp_path / "run"
    stop_after_a_round([*tiny_words, f"tracker={name}"], out)
    resume_run(out, Recorder())
    start_run(load_config(None, [*tiny_words, f"tracker={name}"]), tmp_path / "other", Recorder())
    first, second, other = (options[key] for options in Noting.opened)
    assert second == (first or "run 1")
    assert other != second
