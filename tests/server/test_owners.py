"""A client for every owner: they are counted, and their number is saved with the run."""

from pathlib import Path
from unittest import mock

import pytest

from droppeft.config import as_tree, build_config, load_config
from droppeft.data.sources import load_text
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from refusals import refused
from runs import TOPICS, Recorder, outcome, stop_after_a_round

ROWS = {"ann": 30, "bob": 20, "cid": 12, "dee": 8, "eve": 3}
"""Training rows of each owner."""


@pytest.fixture
def owned(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """Settings of a run with a client for each owner who has six rows."""
    words = [word for topic in TOPICS.values() for word in topic]
    rows = [
        f"{owner} {words[number % 18]} {number},{sorted(TOPICS)[number % 18 // 6]},{owner}\n"
        for owner, count in ROWS.items()
        for number in range(count)
    ]
    folder = tmp_path / "owned"
    folder.mkdir()
    (folder / "train.csv").write_text(f"text,label,who\n{''.join(rows)},food,ann\n")
    (folder / "test.csv").write_text("text,label\nnew bread,food\nnew moon,space\n")
    general = [one for one in tiny_overrides if not one.startswith(("clients", "cohort", "data"))]
    return [
        *(*general, f"data={folder}", "source.missing=drop", "rounds=2"),
        *("partition.kind=natural", "partition.key=who"),
    ]


def test_every_owner_with_enough_rows_is_a_client(owned: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with mock.patch("droppeft.tasks.classification.load_text", wraps=load_text) as reading:
        result = start_run(load_config(None, owned), out, Recorder())
    assert reading.call_count == 1
    saved = load_config(out / "config.toml")
    assert (
        (saved.clients, saved.cohort_size) == (result["clients"], result["cohort_size"]) == (4, 4)
    )
    found = result["data_findings"]
    assert (found["rows_read"], found["train_rows"], found["test_rows"]) == (76, 70, 2)
    assert (found["without_text"], found["left_out_rows"], found["left_out_owners"]) == (1, 3, 1)
    assert found["sentences"][0] == "left out: 1 row without a text (source.missing=drop)"
    # Resumed is the same as uninterrupted, and so is the run of the saved configuration.
    stop_after_a_round(owned, tmp_path / "stopped")
    resume_run(tmp_path / "stopped", Recorder())
    start_run(saved, tmp_path / "again", Recorder())
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "again") == outcome(out)


def test_what_depends_on_the_number_of_owners_is_checked(owned: list[str], tmp_path: Path) -> None:
    for settings, sentence in (
        (
            ["quorum=5"],
            r"quorum=5 is larger than cohort_size=4.*\(partition.key=who has 4 owners\)",
        ),
        (["cohort_size=5"], "cohort_size=5 is larger than clients=4"),
        (["partition.min_rows=40"], "none of the 5 owners in partition.key=who has"),
        (["clients=5"], "4 owners with partition.min_rows=6 rows, fewer than clients=5; leave"),
        (["clients=5", "partition.small=error"], "client 4 has 3 rows, fewer than"),
    ):
        with refused(sentence):
            start_run(load_config(None, [*owned, *settings]), tmp_path / "run", Recorder())
        assert not (tmp_path / "run").exists()
    plain = [one for one in owned if not one.startswith(("method", "dropout"))]
    central = start_run(
        load_config(None, [*plain, "method=centralised"]),
        tmp_path / "central",
        Recorder(),
    )
    assert central["config"]["training"]["local_steps"] == 2 * 4
    assert central["train_rows"] == central["data_findings"]["train_rows"] == 73


def test_clients_and_cohort_have_defaults() -> None:
    sizes = {
        (): (20, 5),
        ("clients=3",): (3, 3),
        ("partition.kind=natural", "partition.key=a"): (0, 0),
        ("partition.kind=natural", "partition.key=a", "clients=4"): (4, 4),
        ("task=causal_lm",): (20, 5),
    }
    for settings, expected in sizes.items():
        config = load_config(None, settings)
        assert (config.clients, config.cohort_size) == expected
        assert build_config(as_tree(config)) == config
    for setting in ("clients=0", "cohort_size=0"):
        with refused(f"{setting} is too few; give 1 or more"):
            load_config(None, [setting])
