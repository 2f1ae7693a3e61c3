"""The commands that set up a federation of machines: its keys, and Flower's two programs. Ours."""

from pathlib import Path
from typing import Annotated

import typer

from droppeft.errors import DroppeftError


def keys(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation's keys.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or IP address of the server; may be repeated.", show_default=False),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Number of clients.", show_default="3")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make a new certificate for the server.")
    ] = False,
) -> None:
    """Make the certificates and keys of a federation of sites, one folder for each party.

    With --clients, the folder of a federation gets the keys of further clients. Nothing is
    overwritten but the server's certificate with --renew.
    """
    from droppeft.extras import require
    from droppeft.report import show_keys as report

    require("flower", "a federation of sites")
    from droppeft.transports.flower.keys import add_clients, make_federation, renew_server

    if renew and clients:
        raise DroppeftError("--renew and --clients are two steps; give one after the other")
    if renew:
        typer.echo(report.about_renewed(folder, renew_server(folder, host or ())))
    elif host:
        made = make_federation(folder, host, clients or 3)
        typer.echo(report.about_federation(folder, host[0], made))
    elif clients and folder.is_dir():
        typer.echo(report.about_new_clients(folder, add_clients(folder, clients)))
    else:
        raise DroppeftError("--host is missing: the name or IP address of the server")


def superlink(context: typer.Context) -> None:
    """Run Flower's SuperLink, of which other machines reach only what nodes need.

    It takes the options of flower-superlink. Other machines cannot start runs and cannot register
    nodes: Control API and Runtime API serve this machine only.
    """
    from droppeft.extras import require

    require("flower", "a SuperLink")
    from droppeft.transports.flower.superlink import run

    run(context.args)


def supernode(context: typer.Context) -> None:
    """Run Flower's SuperNode, which runs droppeft's ClientApp and no other.

    It takes the options of flower-supernode. An app with code of its own is not run, whoever sends
    it, so that the rules of the site's node file hold.
    """
    from droppeft.extras import require

    require("flower", "a SuperNode")
    from droppeft.transports.flower.supernode import run

    run(context.args)
