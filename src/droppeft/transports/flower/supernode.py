"""Flower's SuperNode, which runs droppeft's ClientApp and no other; ours.

With each run a SuperLink sends an app, whose code a SuperNode would run, and with it anything that
the server's operator chooses. This one runs only an app without code of its own that names the
ClientApp of the droppeft that is installed here, so that the site's rules hold whatever is sent.
"""

import hashlib
import importlib
import io
import re
import sys
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.common.config import parse_config_args
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as internal
from flwr.supernode.fleet_http_connection import http_request_response

from droppeft.client.node_file import read_node_file
from droppeft.errors import DroppeftError
from droppeft.transports.flower.client_app import NODE_FILE
from droppeft.transports.flower.known_flower import check_flower

FILES = [".info/CONTENT", "pyproject.toml"]
"""All files of an app without code."""

CLIENT_APP = "droppeft.transports.flower.client_app:app"

COMPONENTS = frozenset({"serverapp", "clientapp"})
"""Components that an app may name: a SuperNode would import others, such as an AgentApp, too."""

REFUSED = (
    "droppeft: the app of this run is not run here, because it is not examples/flower_app of "
    "droppeft as it is, without code of its own"
)
"""Printed before Flower says that the app could not be verified."""

MOST_BYTES = 100_000
"""Size above which an app is refused unread."""

_PART = re.compile(r"\w[\w.+-]*", re.ASCII)
"""Publisher, name or version of an app, of which Flower makes the name of a folder."""


def run(arguments: Sequence[str]) -> None:
    """Run a SuperNode until it is stopped.

    Args:
        arguments: those of ``flower-supernode``.

    Raises:
        DroppeftError: another version of Flower is installed, the private key does not exist, the
            node file cannot be used, or the SuperNode's own port is taken.
    """
    check_flower()
    key = _value_of("--auth-supernode-private-key", arguments)
    if key is not None and not Path(key).expanduser().is_file():
        raise DroppeftError(f"--auth-supernode-private-key {key}: no such file")
    node_config = _value_of("--node-config", arguments)
    node_file = parse_config_args([node_config]).get(NODE_FILE) if node_config else None
    if node_file is not None:
        read_node_file(Path(str(node_file)).expanduser())
    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    start = internal.start_client_internal

    @contextmanager
    def connected(*given: Any) -> Iterator[Any]:
        with http_request_response(*given) as (node_id, receive, send, get_run, get_fab, *others):
            runs: dict[int, Run] = {}

            def get_known_run(run_id: int) -> Run:
                runs[run_id] = get_run(run_id)
                return runs[run_id]

            def get_app(fab_hash: str, run_id: int) -> Fab:
                # Flower refuses an app without a licence, and verifies one only if it has one.
                fab = get_fab(fab_hash, run_id)
                ours = is_ours(fab, runs[run_id])
                if not ours:
                    print(REFUSED, file=sys.stderr, flush=True)
                return replace(fab, verifications={"valid_license": "none needed"} if ours else {})

            yield (node_id, receive, send, get_known_run, get_app, *others)

    def start_verifying(**given: Any) -> None:
        always = {
            "trusted_entities": {"droppeft": CLIENT_APP},
            "runtime_dependency_install": False,  # an app without code could name any package
        }
        start(**{**given, **always})

    setattr(internal, "http_request_response", connected)  # noqa: B010
    setattr(internal, "_verify_fab", lambda fab, trusted: bool(fab.verifications))  # noqa: B010
    setattr(command, "start_client_internal", start_verifying)  # noqa: B010
    sys.argv = ["flower-supernode", *arguments]
    try:
        command.flower_supernode()
    except RuntimeError as error:
        if "HTTP API failed to start" not in str(error):
            raise
        raise DroppeftError(
            "the SuperNode cannot use its own port on this machine (the error above says why); if "
            "another SuperNode uses it, choose another one, such as --port 9095"
        ) from None


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option, which is given as ``--option value`` or ``--option=value``."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def is_ours(fab: Fab, run: Run) -> bool:
    """Whether an app has no code, names droppeft's ClientApp, and is the one that would be loaded.

    Flower loads an app from the folder that the run's names and the app's hash give, where another
    app may be that was installed earlier.

    Args:
        fab: the app, which is a ZIP file, with the hash that the server states.
        run: of the app, as the server describes it.
    """
    if len(fab.content) > MOST_BYTES:
        return False
    if not hashlib.sha256(fab.content).hexdigest() == fab.hash_str == run.fab_hash:
        return False
    if run.primary_task_type == TaskType.AGENT_APP:  # in its runs no ClientApp is loaded
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(fab.content)) as app:
            if sorted(app.namelist()) != FILES:
                return False
            if sum(one.file_size for one in app.infolist()) > MOST_BYTES:
                return False
            described = tomllib.loads(app.read("pyproject.toml").decode())
            [hashed] = app.read(".info/CONTENT").decode().splitlines()
        about, project = described["tool"]["flwr"]["app"], described["project"]
        components = about["components"]
        parts = (about["publisher"], project["name"], project["version"])
        return bool(
            hashed.startswith("pyproject.toml,")  # Flower would read any file that is listed
            and components["clientapp"] == CLIENT_APP
            and COMPONENTS.issuperset(components)
            and all(map(_PART.fullmatch, parts))
            and (run.fab_id, run.fab_version) == ("/".join(parts[:2]), parts[2])
        )
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):  # a damaged ZIP file
        return False
    except (ValueError, LookupError, TypeError):  # a pyproject.toml that is no app's
        return False
