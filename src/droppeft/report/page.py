"""Write a comparison, or one run, as a self-contained HTML page, and its figures as files. Ours.

The page has no script and loads nothing. It follows the browser's light or dark colour scheme.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from droppeft.comparison.study_files import (
    STUDY,
    RunRecord,
    Study,
    Target,
    as_toml,
    finished,
    read_tables,
)
from droppeft.comparison.summary import Part, summary
from droppeft.comparison.writers import (
    COLUMNS,
    COSTS,
    QUALITY,
    TIMES,
    failures,
    heading,
    notes,
)
from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.files import write_atomically
from droppeft.report.drawing import INK, svg
from droppeft.report.figures import (
    AXES,
    BARS,
    EACH,
    NAMED,
    OF_CLIENTS,
    OF_THE_TARGET,
    TWO,
    figures,
)
from droppeft.report.layers import COVERAGE, IMPORTANCE, RATES, SHARES
from droppeft.runs.folder import RESULT, ROUNDS, read_result
from droppeft.runs.ledger import read_rows

PAGE, FIGURES = "report.html", "figures"
MANY = 12
"""A group with more figures is folded away until the reader opens it."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --soft: #5b6470; --line: #d8dde3;
  --ground: #ffffff; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4af; --line: #333b44;
  --ground: #14171a; --panel: #1c2126; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--ground); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { margin: 2.4rem 0 .6rem; font-size: 1.25rem; }
p, summary { color: var(--soft); max-width: 48rem; }
figure { margin: 1rem 0; padding: .8rem; background: var(--panel); border-radius: .6rem; }
.panels { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(var(--least), 100%), 1fr)); }
.panels > div { max-width: 40rem; }
.wide + .wide { margin-top: 1.2rem; }
figure svg { width: 100%; height: auto; color: var(--ink); display: block; }
figure svg text { font-family: system-ui, sans-serif; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; }
details { margin: .6rem 0; } pre { overflow-x: auto; background: var(--panel); padding: .8rem;
  border-radius: .6rem; font-size: .85rem; }
.failed { color: #c2410c; }
"""

GROUPS = {
    tuple(AXES): "Accuracy of the global model on the fixed sample of test texts: mean over seeds, "
    "with up to five variants a band of one standard deviation.",
    OF_THE_TARGET: "Time until the mean of three evaluations reaches the target; mean over seeds.",
    (
        *OF_CLIENTS,
        EACH,
        TWO,
    ): "Every client's own model on its own test texts at the end of the run, "
    "whether the client ever trained or not; all clients have equal weight. Without personal "
    "layers this is the global model. A dot is one client with one seed, a stroke their mean; "
    "crosses are standard deviations.",
    tuple(
        name for name in BARS if name not in (*OF_THE_TARGET, *OF_CLIENTS)
    ): "Most bytes that a step stored for "
    "its backward pass, and bytes of tensors that travelled in a whole run. Measured.",
}
"""Groups of figures by their names, with captions."""


def write_page(folder: Path) -> Path:
    """Write ``report.html`` and figures into the folder of a comparison or a run.

    Raises:
        DroppeftError: the folder holds neither, it is not finished, or matplotlib is missing.
    """
    require("report", "the page")
    title, study, records = read_folder(folder)
    parts = summary(study, records)
    sections: list[str] = []
    drawn: dict[str, Any] = {}
    for number, part in enumerate(parts):
        runs = [one for one in records if one.place == (part.data, part.model)]
        made = figures(part, runs)
        sections.append(_section(part, made))
        drawn |= {f"{number}-{name}" if len(parts) > 1 else name: f for name, f in made.items()}
    text = _page(title, [_conclusion(folder), *sections], records)
    for name, figure in drawn.items():
        path = folder / FIGURES / name
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".svg").write_text(svg(figure), encoding="utf-8")
        figure.savefig(path.with_suffix(".png"), dpi=150, facecolor="white")
    write_atomically(folder / PAGE, text.encode())
    return folder / PAGE


def read_folder(folder: Path) -> tuple[str, Study, list[RunRecord]]:
    """Title, study and runs of a comparison's folder, or of a run's.

    Raises:
        DroppeftError: the folder holds neither, or it is not finished.
    """
    name = folder.resolve().name
    if (folder / STUDY).is_file():
        return name, *read_tables(folder)
    if (folder / RESULT).is_file():
        result = read_result(folder)
        method, target = result["method"], result["target"]
        goal = None if target is None else Target(accuracy=target)
        run = finished(name, method, result, read_rows(folder / ROUNDS))
        return name, Study((method,), (result["seed"],), target=goal), [run]
    raise DroppeftError(f"{folder}: holds no finished run ({RESULT}) and no comparison ({STUDY})")


def _conclusion(folder: Path) -> str:
    """The sentences of a run's result; nothing for a comparison."""
    if not (folder / RESULT).is_file():
        return ""
    return "".join(f"<p>{html.escape(text)}</p>\n" for text in read_result(folder)["conclusion"])


def _page(title: str, sections: Sequence[str], records: Sequence[RunRecord]) -> str:
    shown = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{shown}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n<h1>{shown}</h1>\n{_lead(records)}"
        f"{''.join(sections)}{_settings(records)}</body></html>\n"
    )


def _lead(records: Sequence[RunRecord]) -> str:
    variants = len({one.variant for one in records})
    seeds = len({one.seed for one in records})
    counts = f"{variants} variant{'s' * (variants > 1)}, {seeds} seed{'s' * (seeds > 1)}."
    return (
        f"<p>{counts} <em>Modelled</em> times are computed from device profiles, with all "
        "clients in parallel; <em>measured</em> times are those of the machine of the "
        "run, as if the clients had worked in parallel.</p>\n"
    )


def _section(part: Part, made: Mapping[str, Any]) -> str:
    shown = "".join(
        _group([made[name] for name in names if name in made], _caption(names, caption, part))
        for names, caption in GROUPS.items()
    )
    configurator = _group(
        [made[name] for name in made if name.startswith((f"{RATES}-", f"{SHARES}-"))],
        "What the configurator chose, mean over seeds. An arm says which share of the layers "
        "above <code>frozen.layers</code> is not trained, and how many of the trained ones are "
        "dropped; arms also differ by pattern, in the order of the legend.",
    )
    coverage = _group(
        [made[name] for name in made if name.startswith((f"{COVERAGE}-", f"{IMPORTANCE}-"))],
        "Share of each round's merged clients that sent a layer, mean over seeds: layers that are "
        "personal, dropped or not trained are not sent. Beside it the gradient norms of the "
        "layers' adapters.",
    )
    failed = "".join(f'<p class="failed">{html.escape(line)}</p>' for line in failures(part))
    noted = "".join(f"<p>{html.escape(line)}</p>\n" for line in notes(part))
    title = f"<h2>{html.escape(heading(part))}</h2>\n"
    tables = _table(part, QUALITY) + _table(part, (*TIMES, *COSTS[1:]))
    return f"{title}{tables}{noted}{failed}{shown}{configurator}{coverage}"


def _caption(names: Sequence[str], caption: str, part: Part) -> str:
    """A group's caption, completed by what depends on the part."""
    if names != tuple(AXES):
        return caption
    dotted = " Dotted: the target." if part.target is not None else ""
    variants = len(part.rows)
    named = f" Of {variants} variants the {NAMED} that end highest have names."
    return f"{caption}{dotted}{named if variants > NAMED else ''}"


def _group(drawn: Sequence[Any], caption: str) -> str:
    if not drawn:
        return ""
    least = 20 if len(drawn) == 3 else 26  # three figures in a row, otherwise two
    panels = "".join(f"<div>{_inline(svg(figure))}</div>" for figure in drawn)
    shown = (
        f'<figure><div class="panels" style="--least: {least}rem">{panels}</div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )
    if len(drawn) <= MANY:
        return shown
    return f"<details><summary>{len(drawn)} figures: {caption}</summary>{shown}</details>\n"


def _inline(text: str) -> str:
    """An SVG element without XML header and fixed size, whose ink is the page's text colour."""
    start = text.index("<svg")
    end = text.index(">", start)
    opening = " ".join(
        word for word in text[start:end].split() if not word.startswith(("width=", "height="))
    )
    return (opening + text[end:]).replace(INK, "currentColor")


def _table(part: Part, columns: Sequence[str]) -> str:
    """An HTML table of the columns that are not empty."""
    cells = {name: COLUMNS[name] for name in columns}
    known = {n: cell for n, cell in cells.items() if {cell(row) for row in part.rows} != {"–"}}
    head = "".join(f"<th>{html.escape(name)}</th>" for name in known)
    texts = ([html.escape(cell(row)) for cell in known.values()] for row in part.rows)
    lines = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in line)}</tr>" for line in texts)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
        "</div>\n"
    )


def _settings(records: Sequence[RunRecord]) -> str:
    """Common settings, each variant's further ones, library versions and machine."""
    by_variant = {run.variant: run.settings for run in records}
    common = set.intersection(*map(set, by_variant.values()))
    parts = [("Common settings", [*_places(records), *map(_spaced, sorted(common))])]
    for variant, settings in by_variant.items():
        own = sorted(set(settings) - common)
        parts += [(f"Settings of {variant}", [*map(_spaced, own)])] if own else []
    results = [one.result for one in records if one.result is not None]
    for title, key in (("Versions", "versions"), ("Machine", "machine")):
        if results:
            known = results[0][key].items()
            parts.append((title, [f"{name} = {value}" for name, value in known]))
    blocks = "".join(
        f"<details><summary>{html.escape(title)}</summary><pre>"
        + html.escape("\n".join(lines))
        + "</pre></details>\n"
        for title, lines in parts
    )
    return f"<h2>Settings, versions, machine</h2>\n{blocks}"


def _places(records: Sequence[RunRecord]) -> list[str]:
    """Models, data and seeds of all runs, as lines of settings."""
    found: dict[str, Iterable[Any]] = {
        "model": dict.fromkeys(one.model for one in records),
        "data": dict.fromkeys(one.data for one in records),
        "seed": dict.fromkeys(one.seed for one in records),
    }
    return [f"{name} = {', '.join(map(as_toml, values))}" for name, values in found.items()]


def _spaced(setting: str) -> str:
    return setting.replace("=", " = ", 1)
