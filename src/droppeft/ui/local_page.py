"""Serve a page of gradio on this machine, so that it loads nothing from other hosts. Ours.

gradio's page names hosts of fonts and scripts. The browser is told not to ask them, by a content
security policy, and gradio's analytics are turned off before it is imported.
"""

import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from droppeft.errors import DroppeftError

HOST, USUAL_PORT = "127.0.0.1", 7860

POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""Nothing from other hosts; gradio's own scripts and styles are partly inline."""

FONT = ("system-ui", "sans-serif")
FONT_MONO = ("ui-monospace", "monospace")

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]


def load_gradio() -> Any:
    """Import gradio without its analytics; the extra ``ui`` must be installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def serve_page(page: Any, host: str, port: int | None) -> None:
    """Serve a page until Ctrl-C, and print its address.

    Args:
        page: a ``gradio.Blocks``.
        host: address of this machine at which it is reached.
        port: ``None`` for 7860 or, if that is taken, a free one.

    Raises:
        DroppeftError: it cannot be served at this address.
    """
    import uvicorn

    with _listening(host, port) as listening:
        # Not to be told about pages that are still open when Ctrl-C ends the server.
        quiet = {"log_level": "critical", "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(local_app(page), **quiet))
        name = f"[{host}]" if ":" in host else host
        print(f"http://{name}:{listening.getsockname()[1]}   (Ctrl-C ends)", flush=True)
        if host not in (HOST, "localhost", "::1"):
            print(
                "Other machines can open this page: it has no password and no encryption.",
                flush=True,
            )
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            print()


def local_app(page: Any) -> App:
    """Return the web application of a page, with droppeft's looks."""
    from fastapi import FastAPI

    gradio = load_gradio()
    theme = gradio.themes.Base(font=FONT, font_mono=FONT_MONO, primary_hue="blue")
    # As a part of the head, since gradio would lose borders from what it takes as `css`.
    style = f"<style>{(Path(__file__).parent / 'page.css').read_text(encoding='utf-8')}</style>"
    app = gradio.mount_gradio_app(
        FastAPI(), page, path="/", theme=theme, head=style, footer_links=[], show_error=True
    )
    return own_host_only(app)


def own_host_only(app: App) -> App:
    """Return an application whose pages the browser lets load nothing from other hosts."""

    async def limited(scope: Event, receive: Receive, send: Send) -> None:
        async def send_with_policy(event: Event) -> None:
            if event["type"] == "http.response.start":
                headers = [*event["headers"], (b"content-security-policy", POLICY)]
                event = {**event, "headers": headers}
            await send(event)

        await app(scope, receive, send_with_policy)

    return limited


def _listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens at an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tried = (USUAL_PORT, 0) if port is None else (port,)
    for number in tried:
        try:
            return socket.create_server((host, number), family=family)
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (")[0]
    raise DroppeftError(
        f"cannot listen at {host}, port {tried[0]}: {reason}; choose others with --host and --port"
    )
