"""Write a comparison as a self-contained HTML page, and its figures as files. Ours.

The page has no script and loads nothing. It follows the browser's light or dark colour scheme.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

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
    COSTS,
    QUALITY,
    TEXTS,
    TIMES,
    failures,
    head,
    heading,
    known_columns,
    notes,
)
from droppeft.errors import DroppeftError
from droppeft.extras import require
from droppeft.files import write_atomically
from droppeft.report.drawing import inline, svg
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
from droppeft.report.layers import COVERAGE, IMPORTANCE, RATES, SHARES, TRAINED

PAGE, FIGURES = "report.html", "figures"
MANY = 12
"""A group with more figures is folded away until the reader opens it."""

TEMPLATE = Environment(
    loader=PackageLoader("droppeft", "report"), autoescape=True, undefined=StrictUndefined
).get_template("page.html")

GROUPS = {
    tuple(AXES): "Quality of the global model on the fixed sample of test texts: mean over seeds, "
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
    """Write ``report.html`` and figures into the folder of a comparison.

    Raises:
        DroppeftError: the folder holds none, or matplotlib is missing.
    """
    require("report", "the page")
    title, study, records = read_folder(folder)
    parts = summary(study, records)
    sections: list[dict[str, Any]] = []
    drawn: dict[str, Any] = {}
    for number, part in enumerate(parts):
        runs = [one for one in records if one.place == (part.data, part.model)]
        made = {name: (svg(figure), figure) for name, figure in figures(part, runs).items()}
        sections.append(_section(part, {name: image for name, (image, _) in made.items()}))
        drawn |= {f"{number}-{name}" if len(parts) > 1 else name: f for name, f in made.items()}
    text = TEMPLATE.render(
        title=title,
        variants=len({one.variant for one in records}),
        seeds=len({one.seed for one in records}),
        sections=sections,
        settings=_settings(records),
        many=MANY,
    )
    for name, (image, figure) in drawn.items():
        path = folder / FIGURES / name
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".svg").write_text(image, encoding="utf-8")
        figure.savefig(path.with_suffix(".png"), dpi=150, facecolor="white")
    write_atomically(folder / PAGE, text.encode())
    return folder / PAGE


def read_folder(folder: Path) -> tuple[str, Study, list[RunRecord]]:
    """Title, study and runs of a comparison's folder.

    Raises:
        DroppeftError: the folder holds none.
    """
    if not (folder / STUDY).is_file():
        raise DroppeftError(f"{folder}: holds no comparison (no {STUDY})")
    return folder.resolve().name, *read_tables(folder)


def _section(part: Part, made: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows of a part, whose figures are given as SVG by name."""

    def drawn(names: Iterable[str]) -> list[Markup]:
        return [inline(made[name]) for name in names if name in made]

    def starting(*prefixes: str) -> list[Markup]:
        return drawn(name for name in made if name.startswith(prefixes))

    return {
        "heading": heading(part),
        "tables": [_table(part, (*QUALITY, *TEXTS[1:])), _table(part, (*TIMES, *COSTS[1:]))],
        "notes": notes(part),
        "failures": failures(part),
        "groups": [(drawn(names), _caption(names, text, part)) for names, text in GROUPS.items()],
        "arms": starting(f"{RATES}-", f"{SHARES}-"),
        "trained": starting(f"{TRAINED}-"),
        "layers": starting(f"{COVERAGE}-", f"{IMPORTANCE}-"),
    }


def _caption(names: Sequence[str], caption: str, part: Part) -> str:
    """A group's caption, completed by what depends on the part."""
    if names != tuple(AXES):
        return caption
    dotted = " Dotted: the target." if part.target is not None else ""
    variants = len(part.rows)
    named = f" Of {variants} variants the {NAMED} that end best have names."
    return f"{caption}{dotted}{named if variants > NAMED else ''}"


def _table(part: Part, columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with the columns that are not empty."""
    known = known_columns(part, columns)
    return [head(name, part) for name in known], [
        [COLUMNS[name](row) for name in known] for row in part.rows
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
