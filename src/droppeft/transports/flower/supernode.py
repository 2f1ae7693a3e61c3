"""Flower's SuperNode, which runs droppeft's ClientApp and no other; ours.

With each run a SuperLink sends an app, whose code a SuperNode would run, and with it anything that
the server's operator chooses. This one runs only an app without code of its own that names the
ClientApp of the droppeft that is installed here, so that the site's rules hold whatever is sent.
"""

import importlib
import io
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flwr.supercore.fab import Fab
from flwr.supernode import start_client_internal as internal
from flwr.supernode.fleet_http_connection import http_request_response

FILES = [".info/CONTENT", "pyproject.toml"]
"""All files of an app without code."""

CLIENT_APP = "droppeft.transports.flower.client_app:app"

MOST_BYTES = 100_000
"""Size above which an app is refused unread."""


def run(arguments: Sequence[str]) -> None:
    """Run a SuperNode until it is stopped.

    Args:
        arguments: those of ``flower-supernode``.
    """
    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    start = internal.start_client_internal

    @contextmanager
    def connected(*given: Any) -> Iterator[Any]:
        with http_request_response(*given) as (node_id, receive, send, get_run, get_fab, *others):

            def get_app(*which: Any) -> Fab:
                # Flower verifies an app only if it comes with a licence.
                return replace(get_fab(*which), verifications={"valid_license": "none needed"})

            yield (node_id, receive, send, get_run, get_app, *others)

    def start_verifying(**given: Any) -> None:
        start(**{**given, "trusted_entities": {"droppeft": CLIENT_APP}})

    setattr(internal, "http_request_response", connected)  # noqa: B010
    setattr(internal, "_verify_fab", lambda fab, trusted: is_ours(fab.content))  # noqa: B010
    setattr(command, "start_client_internal", start_verifying)  # noqa: B010
    sys.argv = ["flower-supernode", *arguments]
    command.flower_supernode()


def is_ours(content: bytes) -> bool:
    """Whether an app, which is a ZIP file, has no code and names droppeft's ClientApp."""
    if len(content) > MOST_BYTES:
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as app:
            if sorted(app.namelist()) != FILES:
                return False
            if sum(one.file_size for one in app.infolist()) > MOST_BYTES:
                return False
            described = tomllib.loads(app.read("pyproject.toml").decode())
        components = described["tool"]["flwr"]["app"]["components"]
        return bool(components["clientapp"] == CLIENT_APP)
    except (zipfile.BadZipFile, ValueError, LookupError, TypeError, NotImplementedError):
        return False
