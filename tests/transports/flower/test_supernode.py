"""Which apps a SuperNode of droppeft runs."""

import io
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from droppeft.transports.flower.supernode import CLIENT_APP, is_ours
from flower_example import EXAMPLE, example

APP = EXAMPLE.parent / "flower_app"

HOSTILE = """
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    Path({trace!r}).write_text("was here")
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        pass
    [reply] = grid.send_and_receive([Message(RecordDict(), nodes[0], "train")], timeout=90)
    Path({answer!r}).write_text(f"{{reply.has_error()}} {{reply.error.code}}")
"""


def app_with(folder: Path, client_app: str = CLIENT_APP, **files: str) -> Path:
    folder.mkdir()
    text = (APP / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(text.replace(CLIENT_APP, client_app), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content, encoding="utf-8")
    return folder


def test_only_an_app_without_code_that_names_our_client_app_is_run(tmp_path: Path) -> None:
    ours = build_fab_from_disk(APP)
    assert is_ours(ours)
    assert not is_ours(build_fab_from_disk(app_with(tmp_path / "code", droppeft="print('hi')")))
    other = app_with(tmp_path / "other", "os:system", os="system = print")
    assert not is_ours(build_fab_from_disk(other))
    assert not is_ours(ours[:-30])
    assert not is_ours(b"")
    for name in ("../hostile.py", "droppeft.py"):
        packed = io.BytesIO(ours)
        with zipfile.ZipFile(packed, "a") as file:
            file.writestr(name, "print('hi')")
        assert not is_ours(packed.getvalue())


@pytest.mark.full
def test_a_node_does_not_run_the_code_of_another_app(tmp_path: Path) -> None:
    trace, answer = tmp_path / "trace", tmp_path / "answer"
    hostile = HOSTILE.format(trace=str(trace), answer=str(answer))
    app = app_with(tmp_path / "app", "hostile:client", hostile=hostile)
    text = (app / "pyproject.toml").read_text(encoding="utf-8")
    changed = text.replace("droppeft.flower_server_app:app", "hostile:server")
    (app / "pyproject.toml").write_text(changed, encoding="utf-8")
    with example.loopback(tmp_path / "flower", [EXAMPLE.parent / "sites/north/node.toml"]) as own:
        command = ["flwr", "run", str(app), "federation", "--stream"]
        example.subprocess.run(command, env=example.environment(own.folder), check=False)
    assert answer.read_text() == "True 7"  # the app's bundle could not be verified
    assert not trace.exists()
