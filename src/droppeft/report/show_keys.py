"""What to do with the keys of a federation: who gets which folder, and the commands to type."""

import shlex
from pathlib import Path

from droppeft.transports.flower.keys import AUTHORITY, SERVER, Made

PORT = 8000
"""The port of a SuperLink, unless another is chosen."""


def about_federation(folder: Path, host: str, made: Made) -> str:
    """Say what was made, who gets it, and how server, nodes and a run are started."""
    server = folder.absolute() / SERVER
    lines = [
        f"{folder / AUTHORITY}: the certificate authority; keep it, and give it to nobody",
        f"{folder / SERVER}: for the server",
        *(f"{folder}/client-{client}: for the site of client {client}" for client in made.clients),
        "",
        _ends(made),
        "Each folder has private keys. Hand it over where nobody can read along.",
        "",
        "On the server, two processes that systemd or a container should restart when they end:",
        "",
        *_indented(superlink_command(server), superexec_command(server)),
        "",
        "Once, also on the server: name the SuperLink in ~/.flwr/config.toml,",
        "",
        *_indented(flower_connection(server).rstrip()),
        "",
        "and register the nodes' keys:",
        "",
        *_indented(*(register_command(server, client) for client in made.clients)),
        "",
        "Write what the sites check their rows against, from your test rows, and send it to them:",
        "",
        *_indented(task_command(len(made.clients))),
        "",
        "On each site, in its folder: write node.toml, check it, and start the node:",
        "",
        *_indented("droppeft node check node.toml --task task.json", node_command(host, "N")),
        "",
        "Start a run on the server:",
        "",
        *_indented(run_command(server, len(made.clients))),
    ]
    return "\n".join(lines)


def about_new_clients(folder: Path, made: Made) -> str:
    """Say what was made for clients that join later."""
    server = folder.absolute() / SERVER
    lines = [
        *(f"{folder}/client-{client}: for the site of client {client}" for client in made.clients),
        "",
        "Register their keys on the server:",
        "",
        *_indented(*(register_command(server, client) for client in made.clients)),
    ]
    return "\n".join(lines)


def about_renewed(folder: Path, made: Made) -> str:
    """Say what was renewed."""
    return f"{folder / SERVER}: new certificate and key; restart the SuperLink\n{_ends(made)}"


def superlink_command(server: Path, host: str = "0.0.0.0", port: int = PORT) -> str:
    """The command that starts the SuperLink."""
    return _command(
        f"droppeft superlink --host {host} --port {port}",
        f"--ssl-ca-certfile {_in(server, 'ca.crt')}",
        f"--ssl-certfile {_in(server, 'server.crt')}",
        f"--ssl-keyfile {_in(server, 'server.key')}",
        f"--database {_in(server, 'superlink.db')}",
        f"--isolation process --superexec-auth-secret-file {_in(server, 'superexec.secret')}",
        "--disable-runtime-dependency-installation",
    )


def superexec_command(server: Path, port: int = PORT) -> str:
    """The command that starts the process which starts runs."""
    return _command(
        f"flower-superexec --runtime-api-address 127.0.0.1:{port}",
        f"--root-certificates {_in(server, 'ca.crt')}",
        f"--superexec-auth-secret-file {_in(server, 'superexec.secret')}",
    )


def flower_connection(server: Path, port: int = PORT) -> str:
    """The lines of Flower's configuration file that name the SuperLink."""
    return (
        f'[superlink.federation]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{server / "ca.crt"}"\n'
    )


def register_command(server: Path, client: int) -> str:
    """The command that makes the SuperLink accept a node."""
    key = _in(server, f"clients/client-{client}.pub")
    return f"flwr supernode register {key} federation --name client-{client}"


def node_command(
    host: str, client: int | str, port: int = PORT, node_file: str = "node.toml"
) -> str:
    """The command that starts a node in the folder of its site."""
    return _command(
        f"droppeft supernode --superlink {_url_host(host)}:{port} --root-certificates ca.crt",
        f"--auth-supernode-private-key client-{client}.key",
        f"--node-config 'node-file=\"{node_file}\"'",
    )


def task_command(clients: int) -> str:
    """The command that writes what the sites check their rows against."""
    return (
        f"droppeft node task data=/data/test.csv partition.kind=sites clients={clients} "
        "--out task.json"
    )


def run_command(server: Path, clients: int) -> str:
    """The command that starts a run."""
    settings = (
        f"partition.kind=sites clients={clients} data=/data/test.csv "
        f"flower.client_keys={server / 'clients'}"
    )
    return _command(
        "flwr run examples/flower_app federation --stream --run-config",
        f"""'settings="{settings}" out="/data/run"'""",
    )


def _ends(made: Made) -> str:
    assert made.server_ends is not None
    return (
        f"The server's certificate ends on {made.server_ends:%Y-%m-%d}; before that, renew it with "
        "droppeft keys FOLDER --renew."
    )


def _command(*parts: str) -> str:
    return " \\\n    ".join(parts)


def _indented(*blocks: str) -> list[str]:
    return [f"  {line}" for block in blocks for line in block.splitlines()]


def _in(folder: Path, name: str) -> str:
    return shlex.quote(str(folder / name))


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
