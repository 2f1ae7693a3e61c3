"""The ServerApp: it starts runs, resumes them, and refuses to resume one of other settings."""

import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.supercore import log

from droppeft import flower_server_app
from droppeft.client.run_inputs import Loaded
from droppeft.config import load_config, to_toml
from droppeft.errors import DroppeftError
from droppeft.transports.base import Transport
from droppeft.transports.registry import in_process
from refusals import refused
from runs import adapter_bytes, stop_after_a_round


@pytest.fixture(autouse=True)
def no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run clients in this process: what is tested here needs no grid."""

    def over(grid: object, loaded: Loaded, **_: object) -> Transport:
        with in_process(loaded) as transport:
            return transport

    monkeypatch.setattr(flower_server_app, "over_grid", over)
    monkeypatch.setattr(flower_server_app, "InMemoryGrid", type(None))  # the class of no grid


def run(out: Path, settings: str = "", config: str = "") -> None:
    given: Any = {"config": config, "settings": settings, "out": str(out)}
    context = Context(1, 0, {}, RecordDict(), given)
    flower_server_app.app(grid=None, context=context)  # type: ignore[arg-type]


def test_a_run_starts_from_settings_and_a_file(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("rounds = 3\n[dropout]\nmean = 0.25\n")
    words = [word for word in tiny_overrides if not word.startswith(("rounds", "dropout"))]
    run(tmp_path / "run", " ".join(words), str(file))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole_run)
    said = capsys.readouterr().out
    assert "droppeft: round 3/3, accuracy 0." in said
    assert ", 2 of 2 clients, " in said
    assert load_config(tmp_path / "run" / "config.toml").transport == "flower"


@pytest.mark.sample("no settings")
@pytest.mark.parametrize("again", [True, False], ids=["same settings", "no settings"])
def test_a_run_is_resumed(
    tiny_overrides: list[str],
    whole_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    again: bool,
) -> None:
    out = tmp_path / "run"
    stop_after_a_round(tiny_overrides, out)
    run(out, " ".join(tiny_overrides) if again else "")
    assert adapter_bytes(out) == adapter_bytes(whole_run)
    said = capsys.readouterr().out
    assert f"droppeft: resuming {out}" in said
    assert "from round 2" in said


def test_a_run_with_another_configuration_is_not_resumed(
    tiny_overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason is printed once, without the traceback that Flower prints of a bug."""
    out = tmp_path / "run"
    stop_after_a_round(tiny_overrides, out)
    with pytest.raises(DroppeftError, match="holds a run with another configuration") as caught:
        run(out, " ".join([*tiny_overrides, "seed=5"]))
    assert "droppeft: " + str(out) in capsys.readouterr().out
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [handler])
    for error in (caught.value, KeyError("a bug")):
        log(logging.ERROR, "ServerApp raised an exception", exc_info=error)
    assert [record.exc_info[0] for record in said if record.exc_info] == [KeyError]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("clients=3", "partition.kind=dirichlet distributes rows of this machine"),
        ("sites=a.toml,b.toml", "sites are node files of this machine"),
    ],
)
def test_a_superlink_takes_sites_of_other_machines_only(
    settings: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(flower_server_app, "InMemoryGrid", type(...))  # no grid is a deployed one
    with refused(reason):
        run(tmp_path / "run", settings)
    # Without settings a run is resumed with those that it has.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(load_config(None, settings.split())))
    with refused(reason):
        run(tmp_path / "run")


def test_a_superlink_without_keys_of_clients_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flower_server_app, "InMemoryGrid", type(...))
    settings = f"partition.kind=sites clients=3 data={tmp_path}/none.csv"
    for keys, said in (("", True), (f" flower.client_keys={tmp_path}", False)):
        with refused("none.csv"):
            run(tmp_path / "run", settings + keys)
        assert ("nodes are taken at their word" in capsys.readouterr().out) is said


def test_a_run_whose_clients_were_counted_is_resumed(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    given = [one for one in tiny_overrides if not one.startswith(("clients", "cohort_size"))]
    natural = [*given, "partition.kind=natural", "partition.key=label"]
    stop_after_a_round(natural, tmp_path / "run")
    run(tmp_path / "run", " ".join(natural))
    assert load_config(tmp_path / "run" / "config.toml").clients == 3
