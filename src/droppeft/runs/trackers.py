"""Log rounds to TensorBoard, MLflow, Weights & Biases or Trackio with accelerate's trackers; ours.

All trackers write into the run's folder and use no network, unless ``WANDB_MODE``,
``MLFLOW_TRACKING_URI`` or ``TRACKIO_DIR`` is set in the environment. A resumed run is logged as the
same run. Weights & Biases stores one offline part per process, all with the same id, which
``wandb sync`` joins.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from droppeft.config import Config, as_tree, flat
from droppeft.errors import DroppeftError
from droppeft.files import write_atomically
from droppeft.runs.callbacks import Callbacks
from droppeft.runs.ledger import RoundRow
from droppeft.runs.listener import Listener
from droppeft.tasks.metrics import primary_metric

FOLDER = "tracker"
"""Folder of the tracker's files, in the run's folder."""

MLFLOW_RUN = "mlflow-run"
"""File in it with the id that MLflow gave to the run."""


def check_tracker(name: str) -> None:
    """Check that a tracker's package is installed.

    Args:
        name: of the tracker, or ``"none"``.

    Raises:
        DroppeftError: it is not installed.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise DroppeftError(
            f"tracker={name} needs the package {name}; run: pip install {name}, or tracker=none"
        )


@contextmanager
def tracked(listener: Listener, config: Config, out: Path) -> Iterator[Listener]:
    """Yield a listener that also writes to the configured tracker, which is closed at the end.

    Without a tracker, the given listener is yielded.
    """
    if config.tracker == "none":
        yield listener
        return
    tracking = TrackingListener(config, out)
    try:
        yield Callbacks([tracking, listener])
    finally:
        tracking.close()


class TrackingListener:
    """Writes the numbers of every round to a tracker.

    Args:
        config: of the run; it names the tracker and is logged as the run's settings.
        out: folder of the run.
    """

    def __init__(self, config: Config, out: Path) -> None:
        self._config, self._out = config, out
        self._tracker: Any = None
        self._environment: dict[str, str] = {}

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Open the tracker; it has the rounds of an earlier process already."""
        variables = _environment(self._out)
        self._environment = {k: v for k, v in variables.items() if k not in os.environ}
        os.environ.update(self._environment)
        self._tracker = _open(self._config.tracker, self._out)
        settings = flat(as_tree(self._config))
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()}
        self._tracker.store_init_configuration(plain)

    def round_done(self, row: RoundRow) -> None:
        """Write the numbers of a round's row, with the round as the step."""
        numbers = {
            name: value
            for name, value in row.as_columns().items()
            if isinstance(value, int | float) and name != "round"
        }
        self._tracker.log(numbers, step=row.round)

    def finished(self, result: Mapping[str, Any]) -> None:
        """Write the final quality of the global model and of the clients' models."""
        if self._tracker is not None:
            names = [metric for metric in result if metric.startswith("global_")]
            names.append(primary_metric(result).key("personalised"))
            values = {f"final_{name}": result.get(name) for name in names}
            final = {name: value for name, value in values.items() if value is not None}
            self._tracker.log(final, step=result["rounds"])

    def close(self) -> None:
        """Close the tracker, also after a failed run, and restore the environment."""
        if self._tracker is not None:
            self._tracker.finish()
        for name in self._environment:
            os.environ.pop(name, None)


def _environment(out: Path) -> dict[str, str]:
    """Environment variables that keep the trackers in the run's folder and off the network."""
    folder = out / FOLDER
    return {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TRACKIO_DIR": str(folder),
    }


def _open(name: str, out: Path) -> Any:
    """Open one of accelerate's trackers, in the run's folder."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # trackers read from it whether this is the main process
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": folder},
        # A resumed process continues the same run: by an id of ours, or by the id MLflow gave it.
        "wandb": {"dir": str(folder), "name": out.name, "id": _run_id(out), "resume": "allow"},
        "mlflow": {"run_name": out.name, "run_id": _read_if_there(folder / MLFLOW_RUN)},
        "trackio": {"name": out.name, "resume": "allow"},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name]("droppeft", **options[name])
    tracker.start()
    if name == "mlflow":
        write_atomically(folder / MLFLOW_RUN, tracker.active_run.info.run_id.encode())
    return tracker


def _run_id(out: Path) -> str:
    return hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]


def _read_if_there(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
