"""Flower's ServerApp: a run whose devices are behind a grid, a simulated or a deployed one."""

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.federation.flower import over_grid
from droppeft.federation.run import CONFIG, resume_run, start_run
from droppeft.ledger import RoundRow
from droppeft.plans import Reply

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start the run that the run configuration describes, or go on with it.

    Its keys are ``config`` (path of a TOML file, or empty), ``settings`` (words as for
    ``droppeft run``) and ``out`` (folder; one that holds a run is resumed).
    """
    given = context.run_config
    out = Path(str(given["out"])).expanduser()
    words = [*shlex.split(str(given["settings"])), "transport=flower"]
    file = Path(str(given["config"])).expanduser() if given["config"] else None
    try:
        if (out / CONFIG).is_file():
            resume_run(out, Log(), lambda loaded: nullcontext(over_grid(grid, loaded)))
        else:
            config = load_config(file, words)
            start_run(config, out, Log(), lambda loaded: nullcontext(over_grid(grid, loaded)))
    except DroppeftError as error:
        _say(str(error))
        raise


class Log:
    """A line of text per event, for logs that somebody streams."""

    def preparing(self, what: str) -> None:
        """Say which step has begun."""
        _say(what)

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Say what is run."""
        self._rounds = about["planned_rounds"]
        _say(f"{about['method']}, {about['model']} on {about['data']}, from round {len(rows) + 1}")

    def replied(self, reply: Reply) -> None:
        """Nothing: rounds are enough."""

    def round_done(self, row: RoundRow) -> None:
        """Say how the round went."""
        quality = "" if row.global_accuracy is None else f", accuracy {row.global_accuracy:.3f}"
        _say(
            f"round {row.round}/{self._rounds}{quality}, {row.accepted} of {len(row.cohort)} "
            f"devices, {row.host_wall_s:.1f} s"
        )
        for failure in row.failures:
            _say(f"  device {failure['device']}: {failure['reason']}")

    def finished(self, result: Mapping[str, Any]) -> None:
        """Say how it ended."""
        _say(f"accuracy on {result['test_rows']} test texts {result['global_accuracy']:.4f}")
        _say(f"adapter {result['adapter_sha256']}")


def _say(text: str) -> None:
    print(f"droppeft: {text}", flush=True)
