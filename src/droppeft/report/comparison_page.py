"""Write a comparison as a self-contained HTML page, and its figures as files. Ours.

The page has no script and loads nothing. It follows the browser's light or dark colour scheme.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from droppeft.comparison.answer import answer, clock_of
from droppeft.comparison.study_files import (
    STUDY,
    RunRecord,
    Study,
    as_toml,
    read_tables,
)
from droppeft.comparison.summary import Part, summary
from droppeft.comparison.writers import (
    COLUMNS,
    failures,
    further_columns,
    head,
    heading,
    main_columns,
    references,
)
from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.files import write_atomically
from droppeft.quantities import counted
from droppeft.report.drawing import inline, svg
from droppeft.report.figures import (
    AXES,
    BANDS,
    BARS,
    EACH,
    NAMED,
    OF_CLIENTS,
    OF_THE_TARGET,
    OVER_ROUNDS,
    TWO,
    figures,
    main_figure,
)
from droppeft.report.layers import COVERAGE, IMPORTANCE, RATES, SHARES, TRAINED

PAGE, FIGURES = "report.html", "figures"

MOST_DATA = 3
"""Most data sets that the title names."""

TEMPLATE = Environment(
    loader=PackageLoader("droppeft", "report"), autoescape=True, undefined=StrictUndefined
).get_template("comparison.html")

FURTHER = (
    (
        "Quality over other costs",
        tuple(AXES),
        "Quality of the global model on the fixed sample of test texts, mean over seeds.",
    ),
    (
        "Time to the target",
        OF_THE_TARGET,
        "Time until the mean of three evaluations reaches the target, mean over seeds.",
    ),
    (
        "Memory and traffic",
        tuple(name for name in BARS if name not in (*OF_THE_TARGET, *OF_CLIENTS)),
        "Most bytes that a step stored for its backward pass, and bytes of tensors that travelled "
        "in a whole run. Measured.",
    ),
    (
        "Clients' own models",
        (*OF_CLIENTS, EACH, TWO),
        "Every client's own model on its own test texts at the end of the run, whether the client "
        "ever trained or not; all clients have equal weight. Without personal layers this is the "
        "global model. A dot is one client with one seed, a stroke their mean; crosses are "
        "standard deviations.",
    ),
    (
        "What the configurator chose",
        (RATES, SHARES),
        "Mean over seeds. An arm says which share of the layers above frozen.layers is not "
        "trained, and how many of the trained ones are dropped; arms also differ by pattern, in "
        "the order of the legend.",
    ),
    (
        "Trained layers",
        (TRAINED,),
        "Share of each round's steps that trained a layer, mean over seeds: the other steps ran "
        "the layer forward only, or skipped it.",
    ),
    (
        "Layers that were sent",
        (COVERAGE, IMPORTANCE),
        "Share of each round's merged clients that sent a layer, mean over seeds: layers that are "
        "personal, dropped or not trained are not sent. Beside it the gradient norms of the "
        "layers' adapters.",
    ),
)
"""Figures below the main one: a title, their names or beginnings of names, and a caption."""


def write_page(folder: Path) -> Path:
    """Write ``report.html`` and figures into the folder of a comparison.

    Raises:
        DroppeftError: the folder holds none, or matplotlib is missing.
    """
    require("report", "the page")
    study, records = read_folder(folder)
    parts = summary(study, records)
    sections: list[dict[str, Any]] = []
    drawn: dict[str, Any] = {}
    for number, part in enumerate(parts):
        runs = [one for one in records if one.place == (part.data, part.model)]
        made = {name: (svg(figure), figure) for name, figure in figures(part, runs).items()}
        sections.append(_section(part, runs, {name: image for name, (image, _) in made.items()}))
        drawn |= {f"{number}-{name}" if len(parts) > 1 else name: f for name, f in made.items()}
    text = TEMPLATE.render(
        title=_title(parts),
        folder=folder.resolve().name,
        seeds=len({one.seed for one in records}),
        sections=sections,
        settings=_settings(records),
    )
    for name, (image, figure) in drawn.items():
        path = folder / FIGURES / name
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".svg").write_text(image, encoding="utf-8")
        figure.savefig(path.with_suffix(".png"), dpi=150, facecolor="white")
    write_atomically(folder / PAGE, text.encode())
    return folder / PAGE


def read_folder(folder: Path) -> tuple[Study, list[RunRecord]]:
    """Study and runs of a comparison's folder.

    Raises:
        DroppeftError: the folder holds none.
    """
    if not (folder / STUDY).is_file():
        raise DroppeftError(f"{folder}: holds no comparison (no {STUDY})")
    return read_tables(folder)


def _title(parts: Sequence[Part]) -> str:
    """How many variants are compared, and on what, as far as it fits into a line."""
    variants = counted(len({row.variant for part in parts for row in part.rows}), "variant")
    if len(parts) == 1:
        return f"{heading(parts[0])}: {variants} compared"
    data = [*dict.fromkeys(Path(part.data).name for part in parts)]
    more = f" and {len(data) - MOST_DATA} more" if len(data) > MOST_DATA else ""
    return f"{variants} compared on {', '.join(data[:MOST_DATA])}{more}"


def _section(part: Part, runs: Sequence[RunRecord], made: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows of a part, whose figures are given as SVG by name."""
    main = main_figure(part, runs)
    further = []
    for title, names, caption in FURTHER:
        found = [
            inline(image)
            for name, image in made.items()
            if name != main and name.rstrip("0123456789").rstrip("-") in names
        ]
        further += [(title, found, caption)] if found else []
    return {
        "heading": heading(part),
        "answer": answer(part),
        "table": _table(part, main_columns(part)),
        "table_caption": _table_caption(part),
        "further_table": _table(part, further_columns(part)),
        "notes": references(part),
        "failures": failures(part),
        "figure": [inline(made[main])] if main in made else [],
        "figure_caption": _figure_caption(part, over_rounds=main == OVER_ROUNDS),
        "further": further,
    }


def _table_caption(part: Part) -> str:
    """What the columns of the main table mean."""
    clock = clock_of(part)
    aimed = part.target is not None
    sooner = f"; speed-ups are over {part.baseline}" if aimed else ""
    reached = " The target is reached when the mean of three evaluations reaches that of the seed."
    return (
        f"Times are {clock.name}{sooner}.{reached if aimed else ''} Activations are the most that "
        "a training step stored for its backward pass; traffic is that of all clients in both "
        "directions. Both are measured."
    )


def _figure_caption(part: Part, *, over_rounds: bool) -> str:
    """What the main figure shows."""
    metric = part.target_metric.label
    metric = metric[0].upper() + metric[1:]
    rows = [row for row in part.rows if row.quality]
    seeds = max((row.seeds for row in rows), default=0)
    mean = " Lines are means over seeds" if seeds > 1 else ""
    bands = ", bands reach from the lowest to the highest" if mean and len(rows) <= BANDS else ""
    named = f" The baseline and the {NAMED - 1} others that end best have names."
    return "".join(
        (
            f"{metric} of the global model on the same sample of test texts throughout.",
            f"{mean}{bands}{'.' if mean else ''}",
            " All variants take about the same time." if over_rounds and len(rows) > 1 else "",
            named if len(rows) > NAMED else "",
        )
    )


def _table(part: Part, columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table."""
    return [head(name, part) for name in columns], [
        [COLUMNS[name](row) for name in columns] for row in part.rows
    ]


def _settings(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
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
    return parts


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
