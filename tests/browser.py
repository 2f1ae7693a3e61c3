"""Chromium without a window, told what to do over its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--no-first-run", "--remote-debugging-port=0"),
)
PATIENCE_S = 120.0


class Tab:
    """A page in the browser.

    Attributes:
        requests: the addresses that it has asked for.
    """

    def __init__(self, socket: Any) -> None:
        self.requests: list[str] = []
        self._socket = socket
        self._last = 0
        for domain in ("Page", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE_S))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]

    def open(self, address: str, width: int = 1280, height: int = 900) -> None:
        """Open an address in a window of this size in pixels."""
        size = {"width": width, "height": height}
        self.command(
            "Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=width < 600
        )
        self.command("Page.navigate", url=address)

    def value(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Wait until an expression is true, also if it fails at first, and return its value."""
        guarded = f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
        until = time.monotonic() + PATIENCE_S
        while not (found := self.value(guarded)):
            assert time.monotonic() < until, (script, self.value("document.body.innerText"))
            time.sleep(0.2)
        return found

    def wait_for_text(self, *texts: str) -> None:
        """Wait until the page shows texts."""
        for text in texts:
            self.wait_for(f"document.body.innerText.includes({json.dumps(text)})")

    def write(self, selector: str, text: str) -> None:
        """Write a text into a field."""
        self.wait_for(f"(document.querySelector({json.dumps(selector)}).focus(), true)")
        self.command("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Press the enter key in the field that was written to."""
        key: Mapping[str, Any] = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self.command("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.command("Input.dispatchKeyEvent", type="keyUp", **key)

    def click(self, selector: str) -> None:
        """Click an element."""
        self.wait_for(f"(document.querySelector({json.dumps(selector)}).click(), true)")

    def save_screenshot(self, path: Path) -> None:
        """Save a picture of the window."""
        found = self.command("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser_tab() -> Iterator[Tab]:
    """Start a browser with one tab; the test is skipped without chromium or websockets."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    connect = pytest.importorskip("websockets.sync.client").connect
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_tab_address(Path(profile)), max_size=None) as socket:
                yield Tab(socket)
        finally:
            browser.terminate()
            browser.wait(timeout=PATIENCE_S)


def _tab_address(profile: Path) -> str:
    """The address of the browser's only tab, once it has started."""
    file = profile / "DevToolsActivePort"
    until = time.monotonic() + PATIENCE_S
    while not (file.is_file() and file.read_text().count("\n")):
        assert time.monotonic() < until, "chromium does not start"
        time.sleep(0.1)
    port = file.read_text().splitlines()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
        [address] = [
            one["webSocketDebuggerUrl"] for one in json.load(answer) if one["type"] == "page"
        ]
    return str(address)
