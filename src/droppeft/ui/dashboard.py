"""A page that shows runs side by side while they go on. Ours.

It reads the ledgers that runs write anyway, so that it shows any run in a folder, on whatever
transport and from whatever process.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from droppeft.errors import DroppeftError
from droppeft.quantities import counted
from droppeft.report.drawing import COLOURS
from droppeft.report.result_html import short_name
from droppeft.report.screen import left_out
from droppeft.runs.folder import CLIENTS, CONFIG, RESULT, ROUNDS
from droppeft.tasks.metrics import METRICS
from droppeft.ui.curves import draw_curves
from droppeft.ui.local_page import load_gradio, serve_page
from droppeft.ui.run_state import (
    ACROSS,
    CLIENT_COLUMNS,
    RunState,
    client_table,
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
    return f"no run yet; start one with: droppeft run --out {folder}/NAME"


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
        f"{config.method} · {short_name(config.data)} · {counted(config.clients, 'client')} · "
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


def dashboard(folder: Path) -> Any:
    """Return the page of the runs in a folder, a ``gradio.Blocks``; it refreshes itself."""
    gr = load_gradio()
    with gr.Blocks(title=f"runs in {folder}", analytics_enabled=False) as page:
        gr.Markdown(f"## Runs in {folder}")
        ticked = gr.CheckboxGroup([], label="Shown side by side", elem_classes="ticked")
        overview = gr.HTML()
        with gr.Row():
            metric = gr.Radio([], label="Quality of the global model", min_width=280)
            across = gr.Radio(list(ACROSS), value=ACROSS[0], label="Over", min_width=280)
        figures = gr.HTML()
        with gr.Accordion("Clients in the last round"):
            clients = gr.HTML()
        with gr.Accordion("Conclusions of finished runs", open=False):
            conclusions = gr.HTML()
        seen = gr.State()
        # It starts with the first answer: before, the browser does not know yet what is ticked.
        timer = gr.Timer(EVERY_S, active=False)
        inputs = [ticked, metric, across, seen]
        outputs = [ticked, metric, seen, timer, overview, figures, clients, conclusions]

        def refresh(*values: Any) -> list[Any]:
            return _refreshed(gr, folder, *values) or [gr.skip()] * len(outputs)

        quietly = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(refresh, inputs, outputs, **quietly)
        timer.tick(refresh, inputs, outputs, **quietly)
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
    names = choose(look(runs, ()), ticked, seen.found.names if seen else None)
    found = look(runs, names)
    if seen == Seen(found, names, metric, across):
        return None
    shown = cards(runs, names)
    labels = metric_labels(card["state"] for card in shown if card["state"] is not None)
    label = metric if metric in labels else next(iter(labels), None)
    return [
        _ticks(gr, found, None if names == list(ticked) else names),
        gr.update(choices=labels, value=label),
        Seen(found, names, label, across),
        gr.update(active=True),
        _rendered("runs.html", shown, nothing="" if runs else nothing_in(folder)),
        _figures(shown, label, across),
        _rendered("clients.html", shown, columns=CLIENT_COLUMNS),
        _rendered("conclusions.html", shown),
    ]


def _figures(shown: Sequence[Mapping[str, Any]], label: str | None, across: str) -> str:
    """The curves of quality and training loss; nothing before the first round."""
    if label is None:
        return ""
    [metric] = [metric for metric in METRICS.values() if metric.label == label]
    states = [(card["name"], card["state"]) for card in shown]
    columns = {metric.key("global"): label, "train_loss": "train loss"}
    drawn = (draw_curves(states, column, name, across) for column, name in columns.items())
    return f'<div class="figures">{"".join(f"<div>{one}</div>" for one in drawn)}</div>'


def choose(found: Looked, ticked: Sequence[str], known: Sequence[str] | None) -> list[str]:
    """Return the runs that are shown: those that are ticked, and those that have begun since.

    Args:
        found: all runs.
        ticked: by the reader; they may have been deleted since.
        known: runs that the page has shown to the reader; ``None`` when it is opened.
    """
    if known is None:
        return ticked_at_first(found)
    began = [name for name in found.names if name not in known and found.stages[name] == "running"]
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
