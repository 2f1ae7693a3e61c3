"""Rounds to TensorBoard, MLflow, Weights & Biases or Trackio, through accelerate's trackers; ours.

All of them write into the run's folder, and none asks the network, unless the environment says so
(``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_DIR``). A run that is resumed goes on as the
same run; Weights & Biases keeps its offline parts apart, under one id for ``wandb sync``.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from droppeft.config import Config, as_tree, flat
from droppeft.errors import DroppeftError
from droppeft.runs.listener import Listener
from droppeft.files import write_atomically
from droppeft.runs.ledger import RoundRow
from droppeft.messages import Reply

FOLDER, MLFLOW_RUN = "tracker", "mlflow-run"


def check_tracker(name: str) -> None:
    """Say what is missing for a tracker.

    Raises:
        DroppeftError: its package is not installed.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise DroppeftError(
            f"tracker={name} needs the package {name}; run: pip install {name}, or tracker=none"
        )


@contextmanager
def tracked(listener: Listener, config: Config, out: Path) -> Iterator[Listener]:
    """The same watcher, with the configured tracker beside it, which is closed in the end."""
    if config.tracker == "none":
        yield listener
        return
    both = Tracked(listener, config, out)
    try:
        yield both
    finally:
        both.close()


class Tracked:
    """Tells a watcher, and writes every round's numbers to a tracker.

    Args:
        watcher: who else is told.
        config: of the run; what its tracker is, and what is noted as the run's settings.
        out: folder of the run.
    """

    def __init__(self, listener: Listener, config: Config, out: Path) -> None:
        self._listener, self._config, self._out = listener, config, out
        self._tracker: Any = None
        self._own: dict[str, str] = {}

    def preparing(self, what: str) -> None:
        """Passed on."""
        self._listener.preparing(what)

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Open the tracker; rounds of an earlier process are there already."""
        self._own = {k: v for k, v in _places(self._out).items() if k not in os.environ}
        os.environ.update(self._own)
        self._tracker = _opened(self._config.tracker, self._out)
        settings = flat(as_tree(self._config))
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()}
        self._tracker.store_init_configuration(plain)
        self._listener.started(about, rows)

    def replied(self, reply: Reply) -> None:
        """Passed on."""
        self._listener.replied(reply)

    def round_done(self, row: RoundRow) -> None:
        """Write the numbers of a round's row, at the step of its number."""
        numbers = {
            name: value
            for name, value in asdict(row).items()
            if isinstance(value, int | float) and name != "round"
        }
        self._tracker.log(numbers, step=row.round)
        self._listener.round_done(row)

    def finished(self, result: Mapping[str, Any]) -> None:
        """Write how good the models are, the global one and the clients' own."""
        if self._tracker is not None:
            names = ("global_accuracy", "global_f1", "global_loss", "personalised_accuracy")
            found = {f"final_{name}": result.get(name) for name in names}
            final = {name: value for name, value in found.items() if value is not None}
            self._tracker.log(final, step=result["rounds"])
        self._listener.finished(result)

    def close(self) -> None:
        """End it, whatever became of the run; the environment is as it was."""
        if self._tracker is not None:
            self._tracker.finish()
        for name in self._own:
            os.environ.pop(name, None)


def _places(out: Path) -> dict[str, str]:
    """What the trackers read from the environment."""
    folder = out / FOLDER
    return {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TRACKIO_DIR": str(folder),
    }


def _opened(name: str, out: Path) -> Any:
    """accelerate's tracker, writing to the run's folder."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # trackers ask it whether this is the main process
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": folder},
        # The same run for a resumed process: by an id, or by the id that mlflow gave it.
        "wandb": {"dir": str(folder), "name": out.name, "id": _id(out), "resume": "allow"},
        "mlflow": {"run_name": out.name, "run_id": _noted(folder / MLFLOW_RUN)},
        "trackio": {"name": out.name, "resume": "allow"},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name]("droppeft", **options[name])
    tracker.start()
    if name == "mlflow":
        write_atomically(folder / MLFLOW_RUN, tracker.active_run.info.run_id.encode())
    return tracker


def _id(out: Path) -> str:
    return hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]


def _noted(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
