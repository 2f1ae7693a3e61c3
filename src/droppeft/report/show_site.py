"""What ``droppeft node check`` prints: the rows of a site, its rules, and what would leave."""

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from droppeft.client.node_file import NodeFile
from droppeft.client.site_check import SiteCheck
from droppeft.client.site_rules import MOST_STEPS
from droppeft.data.missing_values import row_numbers
from droppeft.quantities import counted
from droppeft.report.opening import labelled
from droppeft.report.show_data import KINDS, LABEL_WIDTH, NOTHING_FOUND, columns_text, facts

PARTS = ("train", "validate", "test")
LISTED = 10  # unknown labels


def show(name: str, check: SiteCheck, console: Console) -> None:
    """Print what was found about a site.

    Args:
        name: of its node file.
        check: what was found.
        console: where it is printed.
    """
    client = f" · client {check.node.client}"
    console.print(Text.assemble((name, "bold"), client, f" · for {KINDS[check.task]}"))
    console.print(facts(_about_rows(check)))
    if check.found.label_names:
        console.print(_classes(check))
    console.print(facts([*_about_labels(check), *_about_model(check), *_verdict(check)]))
    console.print(Text("\nWhat would leave this machine", style="bold"))
    console.print(facts(_about_leaving(check)))
    console.print(Text("\nLimits", style="bold"))
    console.print(facts(_about_limits(check.node)))


def _about_rows(check: SiteCheck) -> Iterator[tuple[str, str]]:
    found = check.found
    yield "data", check.node.data
    yield "shape", found.shape
    yield "columns", columns_text(found.findings.columns, found.columns)
    train, validation, test = (len(part) for part in found.rows.parts)
    yield (
        "rows",
        f"{found.findings.rows_read:,} read; {train:,} to train, {validation:,} to validate, "
        f"{test:,} to test",
    )


def _classes(check: SiteCheck) -> Table:
    """The classes in the order of the task, with their numbers of rows."""
    found = check.found
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", min_width=LABEL_WIDTH)
    table.add_column(overflow="fold")
    for _ in PARTS:
        table.add_column(justify="right")
    table.add_row("classes", f"{len(found.label_names):,}, in their order", *PARTS, style="dim")
    counts = [
        np.bincount(found.table.labels[part], minlength=len(found.label_names))
        for part in found.rows.parts
    ]
    for place, name in enumerate(found.label_names):
        style = "" if any(one[place] for one in counts) else "dim"
        table.add_row("", Text(name), *(f"{one[place]:,}" for one in counts), style=style)
    return table


def _about_labels(check: SiteCheck) -> Iterator[tuple[str, str]]:
    unknown = check.found.unknown
    if unknown:
        rows = sum(len(one.rows) for one in unknown)
        yield "left out", f"{counted(rows, 'row')} with labels that are no classes of the task:"
    for one in unknown[:LISTED]:
        yield "", f"{one.label}: {row_numbers(one.rows)} of {one.where}{one.numbering}"
    if unknown:
        rest = f"{len(unknown) - LISTED:,} further labels; " if len(unknown) > LISTED else ""
        yield "", f"{rest}if one is another name of a class, write it in [labels]"
    yield from labelled(check.found.findings.sentences() or [NOTHING_FOUND])


def _about_model(check: SiteCheck) -> Iterator[tuple[str, str]]:
    model = check.node.model
    if model is None:
        yield (
            "model",
            (
                "not checked, since the node file names none (it must, unless the server's is a "
                "packaged model such as builtin)"
            ),
        )
    elif check.compared:
        differs = check.refusal is not None and check.refusal.code.startswith("other_")
        yield "model", f"{model}, {'another than' if differs else 'the same as'} the server's"
    else:
        yield "model", f"{model}, not compared with the server's (--task)"
    if check.lengths is not None:
        half, most = np.percentile(check.lengths, (50, 95))
        yield "tokens", f"median {half:,.0f}, at most {most:,.0f} in 95 % of the rows"


def _verdict(check: SiteCheck) -> Iterator[tuple[str, str]]:
    yield "takes part", "yes" if check.refusal is None else f"no: {check.refusal}"


def _about_leaving(check: SiteCheck) -> Iterator[tuple[str, str]]:
    sending = check.node.send
    tensors = "trained values of adapters in the layers that are shared"
    if check.found.label_names:
        tensors += ", and of the head" if sending.head else "; not of the head (send.head=false)"
    yield "tensors", tensors
    yield (
        "counts",
        "of each local training: rows, tokens and steps, times, mean loss, and a norm of the "
        "gradient for each layer",
    )
    measured = "losses, metrics and number of the rows to validate and test"
    yield "quality", measured if sending.measurements else "none (send.measurements=false)"
    yield "never", "texts, labels, names of files and columns, and error messages"


def _about_limits(node: NodeFile) -> Iterator[tuple[str, str]]:
    limits = node.limits
    yield "steps", f"at most {limits.steps or MOST_STEPS:,} of a local training"
    for name, most, what in (("time", limits.seconds, "s"), ("disk", limits.disk_mb, "MB")):
        yield name, "no limit" if most is None else f"at most {most:,g} {what}"
    yield "methods", "all" if limits.methods is None else ", ".join(limits.methods)
