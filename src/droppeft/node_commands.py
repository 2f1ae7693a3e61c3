"""The commands ``droppeft node ...``: what a site and the server of sites need. Ours."""

from pathlib import Path
from typing import Annotated

import typer

from droppeft.command_line_settings import CommandWithSettings, Overrides, setting_keys
from droppeft.errors import DroppeftError
from droppeft.quantities import counted

node = typer.Typer(
    no_args_is_help=True,
    help="Bring rows of your own to a federation: publish a task, check a site, try it out.",
)


@node.command(cls=CommandWithSettings)
def task(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="New file.")] = Path("task.json"),
) -> None:
    """Write what a server publishes about its task, for sites to check their rows against.

    Settings are those of the run, with partition.kind=sites. The file has the kind of task, the
    names of the classes in their order, and hashes of the model and its tokenizer. Nothing in it
    depends on a row.
    """
    from droppeft.client.published_task import published, write_task
    from droppeft.client.run_inputs import load_model, read_data
    from droppeft.command_line_words import file_and_settings
    from droppeft.config import load_config
    from droppeft.methods.rules import check_settings
    from droppeft.models.hardware import resolve_here
    from droppeft.report.screen import Screen

    _check_new(out)
    config = load_config(*file_and_settings(overrides or []))
    check_settings(config)
    if config.partition.kind != "sites":
        raise DroppeftError(
            "only the server of sites publishes a task; set partition.kind=sites and clients"
        )
    config = resolve_here(config)
    with Screen() as screen:
        screen.preparing("reading the test rows")
        names = read_data(config).corpus.label_names
        _, backbone, _ = load_model(config, names, screen.preparing)
    write_task(published(config.task, names, backbone), out)
    classes = f" with {counted(len(names), 'class', 'classes')}" if names else ""
    typer.echo(f"{out}: task={config.task}{classes}; give it to the sites")


@node.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="NODE.toml", help="The site's node file.")],
    task: Annotated[
        Path | None,
        typer.Option(help="What the server has published.", show_default="not compared"),
    ] = None,
) -> None:
    """Check a site before it joins: which rows would be used, and what would leave.

    It shows the columns that are found, the rows of each class and part, labels that are no class
    of the task, and the rules of the node file. Nothing is sent or downloaded. The exit code is 1
    if the site would not take part.
    """
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

    from rich.console import Console

    from droppeft.client.node_file import read_node_file
    from droppeft.client.published_task import read_task
    from droppeft.client.site_check import check_site
    from droppeft.report import show_site

    found = check_site(read_node_file(file), read_task(task) if task else None)
    show_site.show(str(file), found, Console())
    raise typer.Exit(1 if found.refusal else 0)


@node.command(cls=CommandWithSettings)
def split(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder, file, Hub id or builtin.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE ...", show_default=False, autocompletion=setting_keys),
    ] = None,
    out: Annotated[Path, typer.Option(help="New folder.")] = Path("sites"),
) -> None:
    """Write the clients of a partitioned data set as sites, to try a federation with.

    Each client gets a folder with its rows and a node file. The server gets the test rows, and
    settings: run.toml for all sites in one process, server.toml for sites on other machines.
    Settings are those of a run, such as clients=20 partition.kind=dirichlet. A run over the sites
    has the same adapter as a run with these settings, byte for byte.
    """
    import shlex

    from droppeft.config import load_config
    from droppeft.runs.write_sites import RUN, write_sites

    written = write_sites(load_config(None, [f"data={data}", *(settings or [])]), out)
    fewest, most = min(written.rows), max(written.rows)
    rows = f"{fewest:,} rows each" if fewest == most else f"{fewest:,} to {most:,} rows"
    run, first = (shlex.quote(str(path)) for path in (out / RUN, written.node_file(0)))
    typer.echo(
        f"{out}: {counted(len(written.rows), 'site')} with {rows}, and "
        f"{counted(written.test_rows, 'test row')} of the server\n\n"
        f"All sites in one process:\n  droppeft run {run}\n"
        f"One of them:\n  droppeft node check {first}"
    )


@node.command()
def state(
    delete: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Delete what this run has saved.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """List what runs have saved on this machine, or delete what one run has saved.

    A client saves the tensors that it does not send (in DROPPEFT_STATE), and during a run the
    hidden states of frozen layers (in DROPPEFT_CACHE). A run never deletes tensors. Delete them
    when the run is over: without them a client begins again from the global model, and no longer
    knows which tensors it must keep.
    """
    from rich.console import Console

    from droppeft.client.saved_runs import delete_run, saved_runs
    from droppeft.report import show_saved_runs

    if delete is None:
        show_saved_runs.show(saved_runs(), Console())
        return
    if not yes and any(one.run == delete for one in saved_runs()):
        typer.confirm(f"Is run {delete} over, and shall all it has saved be deleted?", abort=True)
    delete_run(delete)
    typer.echo(f"deleted what run {delete} had saved")


def _check_new(out: Path) -> None:
    if out.exists():
        raise DroppeftError(f"{out}: exists already; choose another file with --out")
    if not out.absolute().parent.is_dir():
        raise DroppeftError(f"{out}: its folder does not exist; make it, or choose another --out")
