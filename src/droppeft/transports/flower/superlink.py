"""Flower's SuperLink, of which other machines reach only what nodes need; ours.

A SuperLink has one port for three APIs. Nodes use the Fleet API, in which they prove who they are.
With the Control API runs are started and nodes are registered, and with the Runtime API an app's
process takes its work; in Flower 1.41 both serve whoever reaches the port. Here they serve only
connections from the same machine.
"""

import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from fastapi import FastAPI
from flwr.common.constant import FLWR_INTERNAL_GRPC_CONTROL_API
from flwr.superlink import main
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, flower_superlink
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from starlette.responses import JSONResponse

from droppeft.transports.flower.known_flower import check_flower

OPEN = "/v1/fleet/"
"""Path of the API that other machines may use."""

HERE = ("127.0.0.1", "::1")
"""Addresses from which all APIs may be used."""

NODES_PROVE = "--enable-supernode-auth"
"""Option with which a node must have a registered key; Flower has it for encrypted ones only."""

FORWARDED = frozenset({b"forwarded", b"x-forwarded-for"})
"""Headers of requests that a proxy hands on, whose senders are elsewhere; anyone can send them."""

REFUSED = "This SuperLink serves flwr on its own machine alone, at the address 127.0.0.1."

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Served = Callable[[Scope, Receive, Send], Awaitable[None]]


class FleetOnly:
    """Refuses requests of other machines, except those to the Fleet API."""

    def __init__(self, app: Served) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one connection, as ASGI defines it."""
        if scope["type"] == "lifespan" or _may(scope):
            await self._app(scope, receive, send)
        else:
            await JSONResponse({"detail": REFUSED}, 403)(scope, receive, send)


def run(arguments: Sequence[str]) -> None:
    """Run a SuperLink until it is stopped; if it is encrypted, nodes must be registered.

    Args:
        arguments: those of ``flower-superlink``.

    Raises:
        DroppeftError: another version of Flower is installed.
    """
    check_flower()
    create = main.create_app

    def create_guarded(
        config: SuperLinkLifespanConfig | None = None,
        superlink_lifespan_class: type[SuperLinkLifespan] | None = None,
    ) -> FastAPI:
        app = create(config, superlink_lifespan_class)
        app.add_middleware(FleetOnly)  # around all others
        return app

    main.create_app = create_guarded
    os.environ.pop(FLWR_INTERNAL_GRPC_CONTROL_API, None)  # a second port, without this guard
    sys.argv = ["flower-superlink", *arguments]
    if "--insecure" not in arguments:
        sys.argv.append(NODES_PROVE)  # Flower lets any node in that does not have to
    flower_superlink()


def _may(scope: Scope) -> bool:
    host, _ = scope.get("client") or ("", 0)
    forwarded = any(name.lower() in FORWARDED for name, _ in scope["headers"])
    return scope["path"].startswith(OPEN) or (host in HERE and not forwarded)
