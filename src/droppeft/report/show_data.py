"""What ``droppeft data`` prints: what was recognised in a data set, and some of its rows."""

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from droppeft.data.summary import Part, Shown, Summary
from droppeft.quantities import percent

KINDS = {
    "classification": "classification of texts",
    "causal_lm": "a causal language model",
}
LEARNT, NOT_LEARNT = "bold green", "dim"

LARGEST_GROUPS = 8  # of classes and categories that are listed


def show(name: str, model: str, summary: Summary, console: Console) -> None:
    """Print a summary, and its rows with what is learnt in another colour than the rest.

    Without colours, as in a file, what is learnt stands in brackets.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan")
    grid.add_column(overflow="fold")
    for label, text in _facts(model, summary):
        grid.add_row(label, Text(text))
    console.print(Text.assemble((name, "bold"), f" · for {KINDS[summary.kind]}"))
    console.print(grid)
    if summary.shown and summary.kind == "causal_lm":
        legend = (Part("learnt", learnt=True), Part(" · not learnt", learnt=False))
        console.print(Text("\nexamples: ") + _marked(legend, console))
    for row in summary.shown:
        console.print(Rule(_title(row), style="dim", align="left"))
        console.print(_marked(row.parts, console))


def _facts(model: str, summary: Summary) -> Iterator[tuple[str, str]]:
    yield "shape", summary.shape
    if summary.columns:
        yield "columns", ", ".join(summary.columns)
    yield "rows", f"{summary.train_rows:,} to train and {summary.test_rows:,} to test"
    if summary.labels:
        what = "classes" if summary.kind == "classification" else "categories"
        yield what, _groups(summary.labels)
    if summary.owners:
        yield (
            "owners",
            f"{len(summary.owners):,}, with {summary.owners[-1]:,} to {summary.owners[0]:,} rows "
            f"(median {np.median(summary.owners):,.0f})",
        )
    median, most, longest = np.percentile(summary.lengths, (50, 95, 100))
    yield (
        "tokens",
        f"per row: median {median:,.0f}, 95 % have at most {most:,.0f}, longest {longest:,.0f} "
        f"(model={model})",
    )
    yield "truncated", _truncated(summary)
    if summary.learnt is not None:
        yield "learnt", f"{percent(summary.learnt)} of the tokens that remain"


def _groups(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {count:,}" for name, count in ordered[:LARGEST_GROUPS])
    more = len(ordered) - LARGEST_GROUPS
    return f"{len(ordered):,}: {listed}" + (f" and {more:,} more" if more > 0 else "")


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
