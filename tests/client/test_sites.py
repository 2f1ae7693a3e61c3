"""Clients that bring rows of their own: partition.kind=sites, in one process."""

import csv
import logging
import random
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from droppeft.client.node_file import read_node_file
from droppeft.client.run_inputs import clients_of
from droppeft.client.site import RefusingSite, read_site, refusal_of
from droppeft.config import load_config
from droppeft.methods.rules import check_settings
from droppeft.report.closing import closing
from droppeft.server.resume import resume_run
from droppeft.server.run import start_run
from refusals import refused
from runs import TOPICS, Recorder, outcome, prepared_run, stop_after_a_round

CANARY = "qwertzuiop"
CLASSES = tuple(sorted(TOPICS))
TASK = ("classification", CLASSES)


def write_rows(path: Path, rows: int, labels: Sequence[str], *columns: str) -> Path:
    """Write a CSV of different texts, which begin with a word that is nowhere else."""
    draw = random.Random("".join(path.parts[-2:]))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns or ("text", "label"))
        for row in range(rows):
            label = labels[row % len(labels)]
            words = draw.choices(TOPICS[label.lower()], k=6)
            writer.writerow((" ".join((CANARY, *words, str(row))), label))
    return path


def write_site(folder: Path, client: int, more: str = "", data: str = "rows.csv") -> Path:
    path = folder / "node.toml"
    path.write_text(f'client = {client}\ndata = "{data}"\n{more}')
    return path


@pytest.fixture
def three_sites(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """Settings of a run with three sites, of which one lacks a class and one is too small."""
    lacks, small, other = (tmp_path / "sites" / name for name in ("lacks", "small", "other"))
    (tmp_path / "sites").mkdir()
    write_rows(lacks / "rows.csv", 40, ["food", "space"])
    write_rows(small / "rows.csv", 9, CLASSES)
    write_rows(other / "rows.csv", 45, ["FOOD", "MUSIC", "SPACE"], "utterance", "kind")
    renamed = "".join(f'{name.upper()} = "{name}"\n' for name in CLASSES)
    nodes = (
        write_site(other, 2, f'[source]\nlabel = "kind"\n[labels]\n{renamed}'),
        write_site(lacks, 0),
        write_site(small, 1),
    )
    general = [
        one
        for one in tiny_overrides
        if not one.startswith(("clients", "cohort", "partition", "data"))
    ]
    data = next(one for one in tiny_overrides if one.startswith("data="))
    return [
        *(*general, f"{data}/test.csv", f"sites={','.join(map(str, nodes))}"),
        *("frozen.layers=2", "dropout.mean=0"),
    ]


def test_sites_train_on_rows_of_their_own(
    three_sites: list[str], tmp_path: Path, state: Path
) -> None:
    out = tmp_path / "run"
    result = start_run(load_config(None, three_sites), out, listener := Recorder())
    assert (result["clients"], result["train_rows"], result["test_rows"]) == (3, 0, 60)
    assert (result["task"], result["classes"]) == ("classification", 3)
    assert "majority_accuracy" not in result
    assert {one["client"]: one["rows"] for one in result["personalised"]} == {0: 4, 2: 6}
    reason = "it has fewer rows of this task than the 20 that it takes part with"
    assert {(one["client"], one["reason"]) for row in listener.rows for one in row.failures} == {
        (1, reason)
    }
    # The other two clients choose the round that is delivered.
    assert all(row.validation_loss is not None for row in listener.rows)
    # A text of a site is in no file of the run, of the states, or of the caches.
    for folder in (out, state):
        assert not [
            path
            for path in folder.rglob("*")
            if path.is_file() and CANARY.encode() in path.read_bytes()
        ]
    stop_after_a_round(three_sites, tmp_path / "stopped")
    resume_run(tmp_path / "stopped", Recorder())
    assert outcome(tmp_path / "stopped") == outcome(out)
    stop_after_a_round(three_sites, tmp_path / "changed")
    with (tmp_path / "sites" / "lacks" / "rows.csv").open("a") as file:
        file.write("new bread,food\n")
    with refused("cannot be resumed: the split differs"):
        resume_run(tmp_path / "changed", Recorder())


def test_a_run_of_sites_that_send_no_measurements_ends(
    three_sites: list[str], tmp_path: Path
) -> None:
    for path in (tmp_path / "sites").glob("*/node.toml"):
        with path.open("a") as file:
            file.write("\n[send]\nmeasurements = false\n")
    words = [*three_sites, "rounds=1"]
    result = start_run(load_config(None, words), tmp_path / "run", Recorder())
    assert result["personalised_clients"] == 0
    assert len(result["personalised_failures"]) == 3
    console = Console(record=True, width=200, file=StringIO())
    console.print(closing(result, None))
    assert "no client was evaluated (client 0: it sends no measurements" in console.export_text()
    assert result["global_accuracy"] is not None


def test_the_server_takes_its_classes_from_a_setting(three_sites: list[str]) -> None:
    names = ("source.classes=space,food,music,sport",)
    loaded = prepared_run(*three_sites, *names).loaded
    assert loaded.data.label_names == ("space", "food", "music", "sport")
    first, small, third = clients_of(loaded)
    assert isinstance(small, RefusingSite)
    assert set(first.table.labels) == {0, 1}
    assert set(third.table.labels) == {0, 1, 2}
    with refused("label space in 20 rows .* is not in source.classes .food, music."):
        prepared_run(*three_sites, "source.classes=food,music")


def test_rows_with_unknown_labels_are_left_out_and_named_in_the_log(
    three_sites: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sites" / "lacks" / "rows.csv"
    with path.open("a") as file:
        file.write("a,sport\nb,food\nc,sport\nd,1\n")
    with caplog.at_level(logging.WARNING, "droppeft"):
        client, *_ = clients_of(prepared_run(*three_sites).loaded)
    assert len(client.table) == 41
    assert (
        f"2 rows (41, 43) of {path}, counted without the header, left out: the label sport is"
        in (caplog.text)
    )
    found = read_site(read_node_file(path.with_name("node.toml")), *TASK)
    assert [(one.label, one.rows.tolist()) for one in found.unknown] == [
        ("1", [43]),
        ("sport", [40, 42]),
    ]
    # Classes that are numbers are found in another spelling, as in other data.
    numbers = ("classification", ("0", "1.0"))
    assert len(read_site(read_node_file(path.with_name("node.toml")), *numbers)) == 1


def test_a_site_splits_its_rows_by_itself(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", 60, CLASSES)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *lines[1:21]]) + "\n")
    node = read_node_file(write_site(tmp_path, 0))
    found = read_site(node, *TASK)
    parts = [{found.table.texts[row] for row in part} for part in found.rows.parts]
    assert [len(part) for part in parts] == [48, 6, 6]
    assert len(set.union(*parts)) == 60
    assert sorted(np.concatenate(found.rows.parts)) == list(range(80))
    again = read_site(node, *TASK)
    for one, other in zip(found.rows.parts, again.rows.parts, strict=True):
        np.testing.assert_array_equal(one, other)
    # The order of other rows changes nothing.
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    reordered = read_site(node, *TASK)
    assert {reordered.table.texts[row] for row in reordered.rows.test} == parts[2]


def test_splits_of_a_site_are_used_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, rows in (("train", 20), ("validation", 3), ("test", 5)):
        write_rows(folder / f"{name}.csv", rows, CLASSES)
    node = read_node_file(write_site(tmp_path, 0, data="rows"))
    assert [one.tolist() for one in read_site(node, *TASK).rows.parts] == [
        [*range(20)],
        [20, 21, 22],
        [23, 24, 25, 26, 27],
    ]
    (folder / "validation.csv").unlink()
    found = read_site(node, *TASK)
    assert [len(part) for part in found.rows.parts] == [17, 3, 5]
    assert found.rows.test.tolist() == [20, 21, 22, 23, 24]


def test_a_site_that_cannot_take_part_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "one,food\ntwo,food\n" * 12)
    found = read_site(read_node_file(write_site(tmp_path, 0)), *TASK)
    assert "too few different texts" in str(
        refusal_of(read_node_file(write_site(tmp_path, 0)), found)
    )
    more = "[split]\nmin_rows = 25\n"
    assert "than the 25 that" in str(
        refusal_of(read_node_file(write_site(tmp_path, 0, more)), found)
    )
    with refused("rows.csv: text is missing in row 25"):
        path.write_text(path.read_text() + ",food\n")
        read_site(read_node_file(write_site(tmp_path, 0)), *TASK)
    with refused("labels: a stands for b, which is no class of the task"):
        read_site(read_node_file(write_site(tmp_path, 0, '[labels]\na = "b"\n')), *TASK)
    write_rows(path, 12, CLASSES, "Befund", "Abteilung")
    path.write_text("".join(f"{row},{line}" for row, line in enumerate(path.open())))
    with refused(r'write text = "Befund" and label = "Abteilung" in \[source\] of the node'):
        read_site(read_node_file(write_site(tmp_path, 0)), *TASK)


def test_sites_are_checked_before_a_run(three_sites: list[str], tmp_path: Path) -> None:
    for settings, sentence in (
        (["clients=2"], "clients=2, but sites names 3"),
        (["partition.kind=iid"], "sites have rows of their own"),
        (["source.max_train_rows=5"], "source.max_train_rows has no effect"),
        ([f"sites={tmp_path}/none.toml"], "none.toml: no such"),
    ):
        with refused(sentence):
            start_run(load_config(None, [*three_sites, *settings]), tmp_path / "run", Recorder())
        assert not (tmp_path / "run").exists()
    with refused("needs all rows in one place"):
        check_settings(load_config(None, ["method=centralised", "sites=a.toml"]))
    node = tmp_path / "sites" / "small" / "node.toml"
    node.write_text(node.read_text().replace("client = 1", "client = 2"))
    with refused("of 3 node files none has client = 1"):
        start_run(load_config(None, three_sites), tmp_path / "run", Recorder())
