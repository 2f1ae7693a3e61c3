"""Flower's ServerApp: a run whose clients are behind a grid, a simulated or a deployed one."""

import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from droppeft.client.run_inputs import Loaded
from droppeft.config import Config, load_config, resolve
from droppeft.config.schema import HALF
from droppeft.errors import DroppeftError
from droppeft.messages import Reply
from droppeft.methods import method_named
from droppeft.runs.folder import CONFIG
from droppeft.runs.ledger import RoundRow
from droppeft.server.run import resume_run, start_run
from droppeft.transports.base import Transport
from droppeft.transports.flower.grid import over_grid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start the run that the run configuration describes, or go on with it.

    Its keys are ``config`` (path of a TOML file, or empty), ``settings`` (words as for
    ``droppeft run``) and ``out`` (folder; one that holds a run is resumed).
    """
    given = {key: str(context.run_config[key]) for key in ("config", "settings", "out")}
    out = Path(given["out"]).expanduser()

    def connect(loaded: Loaded) -> AbstractContextManager[Transport]:
        return nullcontext(over_grid(grid, loaded))

    try:
        wanted = _configuration(given["config"], given["settings"])
        if (out / CONFIG).is_file():
            if given["config"] or given["settings"]:
                _check_same(wanted, load_config(out / CONFIG), out)
            _say(f"going on with {out}")
            resume_run(out, Log(), connect)
        else:
            start_run(wanted, out, Log(), connect)
    except DroppeftError as error:
        _say(str(error))
        raise


def _configuration(file: str, settings: str) -> Config:
    return load_config(
        Path(file).expanduser() if file else None, [*shlex.split(settings), "transport=flower"]
    )


def _check_same(wanted: Config, found: Config, out: Path) -> None:
    """Refuse to give an earlier run out as the one that was asked for."""
    wanted = method_named(wanted.method).adjust(resolve(wanted, cuda=torch.cuda.is_available()))
    if wanted.frozen.layers == HALF:  # of a model that is not loaded yet; the run has the number
        layers = {"layers": found.frozen.layers}
        wanted = wanted.model_copy(update={"frozen": wanted.frozen.model_copy(update=layers)})
    if wanted != found.model_copy(update={"transport": wanted.transport}):
        raise DroppeftError(
            f"{out} holds a run with another configuration: choose another folder, "
            "or leave config and settings empty to go on with that one"
        )


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
            f"clients, {row.host_wall_s:.1f} s"
        )
        for failure in row.failures:
            _say(f"  client {failure['client']}: {failure['reason']}")

    def finished(self, result: Mapping[str, Any]) -> None:
        """Say how it ended."""
        if result["global_accuracy"] is not None:
            _say(f"accuracy on {result['test_rows']} test texts {result['global_accuracy']:.4f}")
            if result["adapter_sha256"] is not None:
                _say(f"adapter {result['adapter_sha256']}")
        if result.get("personalised_accuracy") is not None:
            clients = result["personalised_devices"]
            _say(f"mean of {clients} clients' own models {result['personalised_accuracy']:.4f}")


def _say(text: str) -> None:
    print(f"droppeft: {text}", flush=True)
