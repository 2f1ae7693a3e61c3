"""A page that shows runs side by side while they go on. Ours.

It reads the ledgers that runs write anyway, so that it shows any run in a folder, on whatever
transport and from whatever process.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from droppeft.errors import DroppeftError
from droppeft.quantities import counted
from droppeft.report.drawing import COLOURS
from droppeft.report.result_html import data_name
from droppeft.report.screen import left_out
from droppeft.runs.folder import CLIENTS, CONFIG, RESULT, ROUNDS
from droppeft.tasks.metrics import METRICS
from droppeft.ui.local_page import load_gradio, serve_page
from droppeft.ui.run_state import (
    ACROSS,
    CLIENT_COLUMNS,
    RunState,
    client_table,
    curve,
    facts,
    find_runs,
    read_state,
    sentence,
    stage_of,
    stamp,
)

EVERY_S = 3.0
MOST_TICKED = 4
"""So many runs are ticked when the page is opened."""

TRAIN_LOSS = "train loss"

TEMPLATES = Environment(
    loader=PackageLoader("droppeft", "ui"), autoescape=True, undefined=StrictUndefined
)


def watch_runs(folder: Path, host: str, port: int | None) -> None:
    """Serve the page of the runs in a folder until Ctrl-C.

    Raises:
        DroppeftError: the folder does not exist, or it cannot be served at this address.
    """
    runs = find_runs(folder)
    print(f"{folder}: {counted(len(runs), 'run') if runs else nothing_in(folder)}")
    serve_page(dashboard(folder), host, port)


def nothing_in(folder: Path) -> str:
    """What is said about a folder without runs."""
    return f"no run yet; it will appear here once it has begun, as by: droppeft run --out {folder}/NAME"


@dataclass(frozen=True)
class Looked:
    """What a look at the runs has found.

    Attributes:
        names: of all runs, the last one first.
        stages: of each run.
        stamps: of the files of the ticked runs; equal ones mean that nothing has changed.
    """

    names: Sequence[str]
    stages: Mapping[str, str]
    stamps: Sequence[tuple[float, int]]


def look(runs: Mapping[str, Path], ticked: Iterable[str]) -> Looked:
    """Look which runs there are, and whether the ticked ones have changed."""
    files = [runs[name] / file for name in ticked for file in (CONFIG, ROUNDS, CLIENTS, RESULT)]
    stages = {name: stage_of(run) for name, run in runs.items()}
    return Looked(list(runs), stages, [stamp(file) for file in files])


def ticked_at_first(found: Looked) -> list[str]:
    """The runs that are shown when the page is opened: those that go on, else the last one."""
    running = [name for name in found.names if found.stages[name] == "running"]
    return (running or list(found.names[:1]))[:MOST_TICKED]


def cards(runs: Mapping[str, Path], ticked: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the templates show of each ticked run; of one that cannot be read, why."""
    shown = []
    for name, colour in zip(ticked, cycle(COLOURS)):
        card: dict[str, Any] = {"name": name, "colour": colour, "state": None}
        try:
            state = read_state(runs[name])
        except DroppeftError as error:
            empty = dict.fromkeys(("facts", "conclusion", "clients", "notes"), ())
            card |= {"stage": "unreadable", "about": "", "planned": 0, "done": 0}
            shown.append({**card, **empty, "sentence": str(error)})
        else:
            shown.append({**card, "state": state, **_card(state)})
    return shown


def _card(run: RunState) -> dict[str, Any]:
    config, last = run.config, run.rows[-1] if run.rows else None
    about = (
        f"{config.method} · {data_name(config.data)} · {counted(config.clients, 'client')} · "
        f"seed {config.seed}"
    )
    more = len(run.clients) - len(client_table(run))
    notes = [line.plain.strip() for line in left_out(last)] if last else []
    return {
        "stage": run.stage,
        "about": about if config.transport == "in_process" else f"{about} · {config.transport}",
        "planned": config.rounds,
        "done": len(run.rows),
        "sentence": sentence(run),
        "facts": facts(run),
        "conclusion": run.conclusion,
        "clients": client_table(run),
        "notes": [*([f"and {counted(more, 'client')} more"] if more else []), *notes],
    }


def metric_labels(states: Iterable[RunState]) -> list[str]:
    """The labels of the metrics that runs have, the primary one of the first run first."""
    found: dict[str, None] = {}
    for state in states:
        keys = state.rows[-1].quality if state.rows else {}
        found |= {m.label: None for m in METRICS.values() if m.key("global") in keys}
    return list(found)


def curves(shown: Sequence[Mapping[str, Any]], label: str, across: str) -> pd.DataFrame:
    """Return a row for each point of the curve of each run: run, x and y.

    Args:
        shown: as :func:`cards` returns them.
        label: of a metric, or ``TRAIN_LOSS``.
        across: one of :data:`~droppeft.ui.run_state.ACROSS`.
    """
    keys = {metric.label: metric.key("global") for metric in METRICS.values()}
    column = keys.get(label, "train_loss")
    rows = [
        (card["name"], *point)
        for card in shown
        if card["state"] is not None
        for point in curve(card["state"], column, across)
    ]
    return pd.DataFrame(rows, columns=["run", "x", "y"])


def dashboard(folder: Path) -> Any:
    """Return the page of the runs in a folder, a ``gradio.Blocks``; it refreshes itself."""
    gr = load_gradio()
    with gr.Blocks(title=f"runs in {folder}", analytics_enabled=False) as page:
        gr.Markdown(f"## Runs in {folder}")
        ticked = gr.CheckboxGroup([], label="Shown side by side", elem_classes="ticked")
        overview = gr.HTML()
        with gr.Row():
            metric = gr.Radio([], label="Quality of the global model", visible=False)
            across = gr.Radio(list(ACROSS), value=ACROSS[0], label="Over", visible=False)
        with gr.Row():
            quality, loss = (gr.LinePlot(x="x", y="y", color="run", visible=False) for _ in "ab")
        with gr.Accordion("Clients in the last round", visible=False) as last_round:
            clients = gr.HTML()
        seen = gr.State()
        inputs = [ticked, metric, across, seen]
        outputs = [*inputs, overview, quality, loss, last_round, clients]

        def refresh(*values: Any) -> list[Any]:
            return _refreshed(gr, folder, *values) or [gr.skip()] * len(outputs)

        quietly = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(refresh, inputs, outputs, **quietly)
        gr.Timer(EVERY_S).tick(refresh, inputs, outputs, **quietly)
        for control in (ticked, metric, across):
            control.input(refresh, inputs, outputs, **quietly)
    return page


@dataclass(frozen=True)
class Seen:
    """What a page shows: if a look finds the same, nothing is sent to the browser."""

    found: Looked
    ticked: Sequence[str]
    metric: str | None
    across: str


def _refreshed(
    gr: Any,
    folder: Path,
    ticked: Sequence[str],
    metric: str | None,
    across: str,
    seen: Seen | None,
) -> list[Any] | None:
    """New values of the outputs of :func:`dashboard`; ``None`` if nothing has changed."""
    runs = find_runs(folder) if folder.is_dir() else {}
    shown_names = choose(look(runs, ()), ticked, seen.found.names if seen else None)
    found = look(runs, shown_names)
    if seen == Seen(found, shown_names, metric, across):
        return None
    shown = cards(runs, shown_names)
    labels = metric_labels(card["state"] for card in shown if card["state"] is not None)
    label = metric if metric in labels else next(iter(labels), None)
    colours = {card["name"]: card["colour"] for card in shown}
    looks = {"color_map": colours, "x_title": across, "visible": bool(labels)}
    return [
        _ticks(gr, found, None if shown_names == list(ticked) else shown_names),
        gr.update(choices=labels, value=label, visible=bool(labels)),
        gr.update(visible=bool(labels)),
        Seen(found, shown_names, label, across),
        _rendered("runs.html", shown, nothing="" if runs else nothing_in(folder)),
        gr.update(value=curves(shown, label or "", across), y_title=label, **looks),
        gr.update(value=curves(shown, TRAIN_LOSS, across), y_title=TRAIN_LOSS, **looks),
        gr.update(visible=bool(labels)),
        _rendered("clients.html", shown, columns=CLIENT_COLUMNS),
    ]


def choose(found: Looked, ticked: Sequence[str], known: Sequence[str] | None) -> list[str]:
    """Return the runs that are shown: those that are ticked, and those that have begun since.

    Args:
        found: all runs.
        ticked: by the reader; they may have been deleted since.
        known: runs that the page has shown to the reader; ``None`` when it is opened.
    """
    if known is None:
        return ticked_at_first(found)
    began = [
        name for name in found.names if name not in known and found.stages[name] == "running"
    ]
    kept = [name for name in ticked if name in found.names]
    return [*kept, *began[: max(0, MOST_TICKED - len(kept))]]


def _ticks(gr: Any, found: Looked, value: Sequence[str] | None) -> Any:
    """The list of runs; what is ticked is left as it is if ``value`` is ``None``."""
    choices = [
        (name if found.stages[name] == "finished" else f"{name} ({found.stages[name]})", name)
        for name in found.names
    ]
    return gr.update(choices=choices, **({} if value is None else {"value": list(value)}))


def _rendered(template: str, shown: Sequence[Mapping[str, Any]], **more: Any) -> str:
    return TEMPLATES.get_template(template).render(runs=shown, **more)
