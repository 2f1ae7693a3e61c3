"""Flower's ServerApp: runs droppeft with clients that are reached over a Flower grid.

The grid may be simulated or deployed.
"""

import logging
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from droppeft.client.run_inputs import Loaded
from droppeft.config import Config, load_config, resolve_clients, resolve_layers
from droppeft.config.frozen import HALF
from droppeft.errors import DroppeftError
from droppeft.messages.reply import Reply
from droppeft.methods import method_named
from droppeft.models.hardware import resolve_here
from droppeft.quantities import counted
from droppeft.report.page_writer import PageWriter
from droppeft.resources.model_shape import model_shape
from droppeft.runs.callbacks import Callbacks
from droppeft.runs.folder import CONFIG
from droppeft.runs.ledger import RoundRow
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from droppeft.tasks.metrics import primary_metric
from droppeft.transports.base import Transport
from droppeft.transports.flower.grid import over_grid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start the run that the run configuration describes, or resume it.

    The keys of the run configuration are ``config`` (path of a TOML file, or empty), ``settings``
    (overrides as for ``droppeft run``) and ``out`` (folder of the run; if it holds a run, that run
    is resumed).
    """
    logging.getLogger("flwr").addFilter(_is_not_said)
    given = {key: str(context.run_config[key]) for key in ("config", "settings", "out")}
    out = Path(given["out"]).expanduser()
    listener = Callbacks([PageWriter(out), Log()])

    def connect(loaded: Loaded) -> AbstractContextManager[Transport]:
        return nullcontext(over_grid(grid, loaded, say=_say))

    try:
        requested = _requested_config(given["config"], given["settings"])
        saved = load_config(out / CONFIG) if (out / CONFIG).is_file() else None
        if not isinstance(grid, InMemoryGrid):
            _check_sites(saved or requested)
            if (saved or requested).flower.client_keys is None:
                _say(
                    "flower.client_keys is not set, so that nodes are taken at their word for "
                    "which client they are"
                )
        if saved is not None:
            if given["config"] or given["settings"]:
                _check_same(requested, saved, out)
            _say(f"resuming {out}")
            resume_run(out, listener, connect)
        else:
            start_run(requested, out, listener, connect)
    except DroppeftError as error:
        _say(str(error))
        raise


def _is_not_said(record: logging.LogRecord) -> bool:
    """Whether a record of Flower's log is no traceback of an error whose sentence was printed."""
    return not (record.exc_info and isinstance(record.exc_info[1], DroppeftError))


def _requested_config(file: str, settings: str) -> Config:
    return load_config(
        Path(file).expanduser() if file else None, [*shlex.split(settings), "transport=flower"]
    )


def _check_sites(config: Config) -> None:
    """Refuse a run on a SuperLink whose clients would not be sites of other machines."""
    if config.partition.kind != "sites":
        raise DroppeftError(
            f"partition.kind={config.partition.kind} distributes rows of this machine, but on a "
            "SuperLink each client has rows of its own; set partition.kind=sites and clients, or "
            "use `droppeft run` on one machine"
        )
    if config.sites:
        raise DroppeftError(
            "sites are node files of this machine; on a SuperLink leave sites out, set clients, "
            "and name the node file of each SuperNode in its --node-config"
        )


def _check_same(requested: Config, saved: Config, out: Path) -> None:
    """Refuse to resume a run whose configuration is not the requested one."""
    if requested.training.precision == "auto":  # goes on in that of the machine where it began
        training = {"precision": saved.training.precision}
        requested = requested.model_copy(
            update={"training": requested.training.model_copy(update=training)}
        )
    requested = resolve_here(requested)
    requested = resolve_clients(requested, saved.clients)
    requested = method_named(requested.method).adjust(requested)
    if requested.frozen.layers == HALF:
        requested = resolve_layers(
            requested, model_shape(requested.model, requested.task).num_layers
        )
    if requested.privacy.noise_multiplier is None:  # it was found from privacy.epsilon
        found = {"noise_multiplier": saved.privacy.noise_multiplier}
        privacy = requested.privacy.model_copy(update=found)
        requested = requested.model_copy(update={"privacy": privacy})
    if requested != saved.model_copy(update={"transport": requested.transport}):
        raise DroppeftError(
            f"{out} holds a run with another configuration: choose another folder, "
            "or leave config and settings empty to resume that run"
        )


class Log:
    """A listener that prints one line of text per event, for Flower's logs."""

    def preparing(self, what: str) -> None:
        """Print which step begins."""
        _say(what)

    def started(self, about: Mapping[str, Any], rows: list[RoundRow]) -> None:
        """Print what is run."""
        self._metric = primary_metric(about)
        self._rounds = about["planned_rounds"]
        _say(f"{about['method']}, {about['model']} on {about['data']}, from round {len(rows) + 1}")
        for sentence in about["data_findings"]["sentences"]:
            _say(f"  {sentence}")

    def replied(self, reply: Reply) -> None:
        """Print nothing; there is a line per round."""

    def round_done(self, row: RoundRow) -> None:
        """Print quality, number of updates, seconds and failures of a round."""
        value = row.quality[self._metric.key("global")]
        quality = "" if value is None else f", {self._metric.label} {value:.3f}"
        spent = "" if row.epsilon is None else f", epsilon {row.epsilon:.3f}"
        _say(
            f"round {row.round}/{self._rounds}{quality}{spent}, {row.accepted} of "
            f"{counted(len(row.cohort), 'client')}, {row.host_wall_s:.1f} s"
        )
        for failure in row.failures:
            _say(f"  client {failure['client']}: {failure['reason']}")

    def finished(self, result: Mapping[str, Any]) -> None:
        """Print the final quality and the hash of the adapter."""
        metric = primary_metric(result)
        value, own = result[metric.key("global")], result.get(metric.key("personalised"))
        if value is not None:
            texts = counted(result["test_rows"], "test text")
            _say(f"{metric.label} on {texts} {value:.4f}")
            if result["adapter_sha256"] is not None:
                _say(f"adapter {result['adapter_sha256']}")
        if own is not None:
            clients = result["personalised_clients"]
            _say(f"own models, mean of {counted(clients, 'client')} {own:.4f}")


def _say(text: str) -> None:
    print(f"droppeft: {text}", flush=True)
