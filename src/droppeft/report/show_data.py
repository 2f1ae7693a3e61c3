"""What ``droppeft data`` prints: what was recognised in a data set, and some of its rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from droppeft.data.findings import TRUNCATED_SHARE
from droppeft.data.summary import Part, Shown, Summary
from droppeft.quantities import percent
from droppeft.report.opening import labelled

KINDS = {
    "classification": "classification of texts",
    "causal_lm": "a causal language model",
}
LEARNT, NOT_LEARNT = "bold green", "dim"

LABEL_WIDTH = len("categories")
LARGEST_GROUPS = 20  # classes and categories that are listed
PERCENTILES = (50, 90, 95, 99)
UNNAMED = "(without a name)"
NOTHING_FOUND = "nothing unusual"


def show(name: str, model: str, summary: Summary, console: Console) -> None:
    """Print a summary, and its rows with what is learnt in another colour than the rest.

    Without colours, as in a file, what is learnt stands in brackets.
    """
    console.print(Text.assemble((name, "bold"), f" · for {KINDS[summary.kind]}"))
    console.print(facts(_about_rows(summary)))
    if summary.labels:
        console.print(_groups(summary))
    console.print(facts([*_about_tokens(model, summary), *_about_clients(summary)]))
    if summary.shown and summary.kind == "causal_lm":
        legend = (Part("learnt", learnt=True), Part(" · not learnt", learnt=False))
        console.print(Text("\nexamples: ") + _marked(legend, console))
    for row in summary.shown:
        console.print(Rule(_title(row), style="dim", align="left"))
        console.print(_marked(row.parts, console))


def facts(lines: Iterable[tuple[str, str]]) -> Table:
    """Return a grid of lines, each with a label."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", min_width=LABEL_WIDTH)
    grid.add_column(overflow="fold")
    for label, text in lines:
        grid.add_row(label, Text(text))
    return grid


def _about_rows(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "shape", summary.shape
    roles = summary.findings.columns
    if roles:
        yield "columns", columns_text(roles, summary.columns)
    train = f"{summary.train_rows:,} to train and " if summary.train_rows else ""
    yield "rows", f"{train}{summary.test_rows:,} to test"
    if summary.owners:
        yield "owners", f"{len(summary.owners):,}; rows: {_spread(summary.owners)}"


def columns_text(roles: Mapping[str, str], columns: Sequence[str]) -> str:
    """Return which columns are read as what, and which are not.

    Args:
        roles: the column of each kind of value.
        columns: all columns.
    """
    read = ", ".join(role if role == name else f"{role} ← {name}" for role, name in roles.items())
    others = [name or UNNAMED for name in columns if name not in roles.values()]
    return read + (f"; not used: {', '.join(others)}" if others else "")


def _groups(summary: Summary) -> Table:
    """The classes or categories, the largest first, with their numbers of rows."""
    what = "classes" if summary.kind == "classification" else "categories"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", min_width=LABEL_WIDTH)
    table.add_column(overflow="fold")
    for _ in ("train", "test"):
        table.add_column(justify="right")
    order = ", largest first" if len(summary.labels) > 1 else ""
    table.add_row(what, f"{len(summary.labels):,}{order}", "train", "test", style="dim")
    ordered = sorted(summary.labels.items(), key=lambda item: -item[1][0])
    for name, (train, test) in ordered[:LARGEST_GROUPS]:
        table.add_row("", Text(name), f"{train:,}", f"{test:,}")
    if rest := [counts for _, counts in ordered[LARGEST_GROUPS:]]:
        train, test = map(sum, zip(*rest, strict=True))
        table.add_row("", f"{len(rest):,} more", f"{train:,}", f"{test:,}")
    return table


def _about_tokens(model: str, summary: Summary) -> Iterator[tuple[str, str]]:
    half, *others = (f"{length:,.0f}" for length in np.percentile(summary.lengths, PERCENTILES))
    shares = [f"{share} %" for share in PERCENTILES[1:]]
    most = ", ".join(f"{share} {length}" for share, length in zip(shares, others, strict=True))
    yield (
        "tokens",
        f"median {half}; at most: {most}; longest {summary.lengths.max():,} (model={model})",
    )
    if summary.kind == "causal_lm" or summary.findings.truncated < TRUNCATED_SHARE:
        yield "truncated", _truncated(summary)
    if summary.learnt is not None:
        yield "learnt", f"{percent(summary.learnt)} of the tokens that remain"


def _about_clients(summary: Summary) -> Iterator[tuple[str, str]]:
    clients = summary.clients
    if isinstance(clients, str):
        yield "clients", clients
    else:
        what = "classes" if summary.kind == "classification" else "categories"
        labels = f"; {what}: {_spread(clients.labels)}" if summary.labels else ""
        yield "clients", f"{len(clients.rows):,}; rows: {_spread(clients.rows)}{labels}"
    yield from labelled(summary.findings.sentences() or [NOTHING_FOUND])


def _spread(values: Sequence[int]) -> str:
    if min(values) == max(values):
        return f"{min(values):,} each"
    return f"{min(values):,} to {max(values):,} (median {np.median(values):,.0f})"


def _truncated(summary: Summary) -> str:
    rows = int(np.sum(summary.lengths > summary.max_length))
    limit = f"training.max_length={summary.max_length}"
    if not rows:
        return f"no row at {limit}"
    text = f"{rows:,} rows ({percent(rows / len(summary.lengths))}) at {limit}"
    if summary.kind == "causal_lm":
        text += f"; {summary.truncated_ends:,} of them lose the end of what is learnt"
    return text


def _title(row: Shown) -> Text:
    label = f" · {row.label}" if row.label else ""
    return Text(f"row {row.row} · {row.tokens:,} tokens{label}")


def _marked(parts: tuple[Part, ...], console: Console) -> Text:
    if console.color_system is None:
        return Text("".join(f"[[{one.text}]]" if one.learnt else one.text for one in parts))
    return Text.assemble(*((one.text, LEARNT if one.learnt else NOT_LEARNT) for one in parts))
