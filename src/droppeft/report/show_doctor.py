"""What ``droppeft doctor`` prints: a table and what to do, or one JSON object."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from droppeft import __version__
from droppeft.doctor import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def is_ready(findings: Mapping[str, Finding]) -> bool:
    """Whether a run with the built-in model and data would work."""
    return all(finding.status != "problem" for finding in findings.values())


def as_json(findings: Mapping[str, Finding]) -> str:
    """A JSON object: ``ok`` is whether a run would work, ``checks`` are in the table's order."""
    checks = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
    return json.dumps({"ok": is_ready(findings), "version": __version__, "checks": checks})


def show(findings: Mapping[str, Finding], console: Console) -> None:
    """Print the table and what to do; commands are never wrapped, so that they can be pasted."""
    console.print(_table(findings))
    remedies = _remedies(findings)
    if remedies:
        console.print(Text("What to do", style="bold"))
    for remedy, names in remedies.items():
        console.print(Text(f"  {', '.join(names)}:"))
        console.print(Text(f"    {remedy}", style="cyan"), soft_wrap=True)
    console.print(_verdict(findings))


def _table(findings: Mapping[str, Finding]) -> Table:
    title = f"droppeft {__version__}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_header=False)
    table.add_column("status")
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("found", overflow="fold")
    for name, finding in findings.items():
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(status, name, Text(finding.found))
    return table


def _remedies(findings: Mapping[str, Finding]) -> dict[str, list[str]]:
    """The checks that each command repairs; commands for problems come first."""
    remedies: dict[str, list[str]] = defaultdict(list)
    for status in ("problem", "note"):
        for name, finding in findings.items():
            if finding.status == status and finding.remedy:
                remedies[finding.remedy].append(f"{name} ({status})")
    return remedies


def _verdict(findings: Mapping[str, Finding]) -> Text:
    if is_ready(findings):
        return Text("\nReady: droppeft run", style="green")
    return Text("\nNot ready: droppeft run would fail or not work as documented", style="red")
