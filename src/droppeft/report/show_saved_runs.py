"""What ``droppeft node state`` prints: what runs have saved on this machine."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from droppeft.client.client_state import state_dir
from droppeft.client.saved_runs import SavedRun
from droppeft.data.cache import cache_dir
from droppeft.quantities import bytes_text

COLUMNS = ("clients", "tensors", "hidden states")


def show(runs: Sequence[SavedRun], console: Console) -> None:
    """Print a line for each run, and the folders."""
    if runs:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("run", style="bold")
        for name in COLUMNS:
            table.add_column(name, justify="right")
        table.add_column("last written")
        for one in runs:
            table.add_row(
                one.run,
                f"{one.clients:,}",
                bytes_text(one.state_bytes),
                bytes_text(one.cached_bytes),
                f"{one.changed:%Y-%m-%d %H:%M}",
            )
        console.print(table)
    else:
        console.print("no run has saved anything on this machine")
    console.print(f"tensors: {state_dir()}\nhidden states: {cache_dir()}", style="dim")
