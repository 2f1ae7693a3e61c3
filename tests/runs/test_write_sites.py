"""Clients of a partitioned data set that are written as sites."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chats import chat_settings
from droppeft.config import load_config
from droppeft.runs.write_sites import write_sites
from droppeft.server.run import start_run
from runs import Recorder, outcome

Settings = Callable[[Path], list[str]]
SAME = ("adapter", "rounds", "clients")
"""Parts of an outcome that do not depend on where the rows come from."""


def of_texts(folder: Path, tiny: list[str]) -> list[str]:
    return [*tiny, "frozen.layers=2", "dropout.mean=0", "sharing.fraction=0.5"]


def of_chats(folder: Path, tiny: list[str]) -> list[str]:
    return [
        *chat_settings(folder),
        "evaluation.generated=0",
        "evaluation.personalised_generated=4",
        "evaluation.validation_clients=2",
    ]


@pytest.mark.parametrize("make", [of_texts, of_chats])
def test_a_run_over_sites_has_the_bytes_of_the_run_that_partitions(
    make: Callable[[Path, list[str]], list[str]], tiny_overrides: list[str], tmp_path: Path
) -> None:
    settings = make(tmp_path, tiny_overrides)
    config = load_config(None, settings)
    written = write_sites(config, tmp_path / "sites")
    expected = start_run(config, tmp_path / "partitioned", Recorder())
    result = start_run(load_config(tmp_path / "sites" / "run.toml"), tmp_path / "run", Recorder())
    assert result["adapter_sha256"] == expected["adapter_sha256"]
    assert result["personalised"] == expected["personalised"]
    found, wanted = outcome(tmp_path / "run"), outcome(tmp_path / "partitioned")
    assert {name: found[name] for name in SAME if name != "adapter"} == {
        name: wanted[name] for name in SAME if name != "adapter"
    }
    server = load_config(tmp_path / "sites" / "server.toml")
    assert (server.clients, server.sites, server.partition.kind) == (4, (), "sites")
    assert sum(written.rows) == expected["train_rows"]
