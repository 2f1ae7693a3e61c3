"""Trackers: they get the numbers of the ledger, offline, in the run's folder."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import accelerate.tracking
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.runs import trackers
from droppeft.runs.trackers import FOLDER
from droppeft.server import run
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from runs import Recorder, adapter_bytes, rows_of, stop_after_a_round

TRACKER = "tracker=tensorboard"


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """Values by name and step, from all event files of a run."""
    values: dict[str, dict[int, float]] = {}
    for file in sorted((out / FOLDER).rglob("events.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            steps = values.setdefault(name, {})
            steps |= {event.step: event.value for event in events.Scalars(name)}
    return values


def assert_rows_are_logged(out: Path, rounds: int) -> None:
    written, rows = scalars(out), rows_of(out / "rounds.jsonl")
    assert len(rows) == rounds
    for name in ("global_accuracy", "train_loss", "upload_bytes", "round_modelled_s"):
        expected = {row["round"]: pytest.approx(row[name]) for row in rows}
        assert written[name] == expected, name


def test_every_round_is_in_the_tracker(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    """The environment is restored; otherwise the next run would be logged in the same folder."""
    out, before = tmp_path / "run", dict(os.environ)
    result = start_run(load_config(None, [*tiny_overrides, TRACKER]), out, Recorder())
    assert_rows_are_logged(out, result["rounds"])
    final = scalars(out)["final_global_accuracy"]
    assert final == {result["rounds"]: pytest.approx(result["global_accuracy"])}
    assert adapter_bytes(out) == adapter_bytes(whole_run)
    assert dict(os.environ) == before


def test_a_run_that_fails_closes_its_tracker(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(trackers.TrackingListener, "close", lambda self: closed.append(True))

    class Failing(Recorder):
        def round_done(self, row: Any) -> None:
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        start_run(load_config(None, [*tiny_overrides, TRACKER]), tmp_path / "run", Failing())
    assert closed == [True]


def test_a_resumed_run_goes_on_in_the_tracker(tiny_overrides: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop_after_a_round([*tiny_overrides, TRACKER], out)
    result = resume_run(out, Recorder())
    assert_rows_are_logged(out, result["rounds"])


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> Any:
        return None

    monkeypatch.setattr(trackers.importlib.util, "find_spec", nothing)
    with pytest.raises(DroppeftError, match="tracker=mlflow needs the package mlflow; run: pip"):
        start_run(
            load_config(None, [*tiny_overrides, "tracker=mlflow"]), tmp_path / "r", Recorder()
        )
    assert not (tmp_path / "r").exists()


class FakeTracker:
    """Stands for accelerate's trackers; records the options with which they are opened."""

    opened: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, project: str, **options: Any) -> None:
        self.opened.append(options)
        run_id = options.get("run_id") or f"run {len(self.opened)}"
        self.active_run = SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def start(self) -> None: ...
    def store_init_configuration(self, settings: Any) -> None: ...
    def log(self, numbers: Any, step: int) -> None: ...
    def finish(self) -> None: ...


@pytest.mark.sample("mlflow-*")
@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("mlflow", "run_id")])
def test_a_resumed_run_is_the_same_run_in_the_tracker(
    name: str, key: str, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, FakeTracker)
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    monkeypatch.setattr(run, "check_tracker", lambda name: None)
    monkeypatch.setattr(FakeTracker, "opened", [])
    out = tmp_path / "run"
    words = [*tiny_overrides, "rounds=2", f"tracker={name}"]
    stop_after_a_round(words, out)
    resume_run(out, Recorder())
    start_run(load_config(None, [*words, "rounds=1"]), tmp_path / "other", Recorder())
    first, second, other = (options[key] for options in FakeTracker.opened)
    assert second == (first or "run 1")
    assert other != second
