"""Which apps a SuperNode of droppeft runs."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run

from droppeft.transports.flower import known_flower, superlink, supernode
from droppeft.transports.flower.supernode import CLIENT_APP, is_ours
from flower_example import EXAMPLE, example
from refusals import refused

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


def app_of(content: bytes) -> tuple[Fab, Run]:
    """An app, and a run of it, as an honest server describes them."""
    hash = hashlib.sha256(content).hexdigest()
    run = replace(Run.create_empty(1), fab_id="droppeft/droppeft-app", fab_version="0.1.0")
    return Fab(hash, content, {}), replace(run, fab_hash=hash)


def accepted(content: bytes) -> bool:
    return is_ours(*app_of(content))


def test_only_an_app_without_code_that_names_our_client_app_is_run(tmp_path: Path) -> None:
    ours = build_fab_from_disk(APP)
    assert accepted(ours)
    assert not accepted(build_fab_from_disk(app_with(tmp_path / "code", droppeft="print('hi')")))
    other = app_with(tmp_path / "other", "os:system", os="system = print")
    assert not accepted(build_fab_from_disk(other))
    assert not accepted(ours[:-30])
    assert not accepted(b"")
    for name in ("../hostile.py", "droppeft.py"):
        packed = io.BytesIO(ours)
        with zipfile.ZipFile(packed, "a") as file:
            file.writestr(name, "print('hi')")
        assert not accepted(packed.getvalue())


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("pyproject.toml", "clientapp = ", 'agentapp = "os:system"\nclientapp = '),
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.1.0/../../other"'),
        (".info/CONTENT", "pyproject.toml,", "/etc/passwd,"),
    ],
)
def test_an_app_without_code_names_no_other_module_and_no_file(
    file: str, old: str, new: str
) -> None:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(APP))) as app:
        files = {name: app.read(name).decode() for name in app.namelist()}
    assert old in files[file]
    files[file] = files[file].replace(old, new)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as changed:
        for name, text in files.items():
            changed.writestr(name, text)
    fab, run = app_of(packed.getvalue())
    named = replace(run, fab_version=new.split('"')[1] if "version" in old else run.fab_version)
    assert not is_ours(fab, named)


def test_a_server_cannot_have_another_installed_app_loaded() -> None:
    fab, run = app_of(build_fab_from_disk(APP))
    assert not is_ours(fab, replace(run, fab_id="acme/other"))
    assert not is_ours(fab, replace(run, fab_version="0.1.0/../../other"))
    other = hashlib.sha256(b"of another app").hexdigest()
    assert not is_ours(replace(fab, hash_str=other), replace(run, fab_hash=other))
    assert not is_ours(fab, replace(run, fab_hash=other))
    assert not is_ours(fab, replace(run, primary_task_type=TaskType.AGENT_APP))


@pytest.mark.parametrize("start", [superlink.run, supernode.run])
def test_the_guards_start_only_with_the_flower_that_they_know(
    start: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_flower, "version", lambda package: "1.42.0")
    with refused("Flower 1.42.0 is installed"):
        start([])


def test_a_private_key_that_does_not_exist_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "client-7.key"
    for given in ([str(absent)], [f"{absent}", "--port", "9095"]):
        with refused("client-7.key: no such file"):
            supernode.run(["--auth-supernode-private-key", *given])
    with refused("client-7.key: no such file"):
        supernode.run([f"--auth-supernode-private-key={absent}"])


def test_a_node_file_is_read_before_the_node_connects(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    with refused("node.toml: no such configuration file"):
        supernode.run(["--node-config", f'node-file="{path}"'])
    path.write_text('client = 0\ndata = "rows.csv"\nlabel = "topic"\n')
    with refused(r"unknown key label in .*node.toml; did you mean source.label\?"):
        supernode.run(["--node-config", f'node-file="{path}"'])


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
