"""The page of a run: what it shows of which run, without matplotlib too, and when it fails."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from droppeft.report import client_activity
from droppeft.report.confusion_table import LARGEST, OPEN, confusion_table
from droppeft.report.page_writer import PageWriter
from droppeft.report.run_page import write_run_page
from droppeft.runs.ledger import RoundRow
from droppeft.tasks.metrics import ACCURACY
from page_reader import Reader, check_self_contained
from refusals import refused
from runs import rows_of

HEADINGS = ["Rounds", "Classes", "What the clients did", "Layers", "Cost", "What was run"]


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(whole_run, tmp_path / "a & b"))


def result_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "result.json").read_text()))


def rewrite(run: Path, name: str, change: Callable[[Any], object]) -> None:
    """Change the object of a JSON file, or each row of a JSON Lines file."""
    lines = (run / name).read_text().splitlines() if name.endswith("l") else [None]
    values = [json.loads(line or (run / name).read_text()) for line in lines]
    for value in values:
        change(value)
    (run / name).write_text("".join(json.dumps(value) + "\n" for value in values))


def test_a_classification_has_counts_curves_classes_and_clients(run: Path) -> None:
    result = result_of(run)
    assert sum(map(sum, result["confusion"])) == result["test_rows"] == 60
    right = sum(result["confusion"][one][one] for one in range(3))
    assert right / 60 == pytest.approx(result["global_accuracy"])

    text = write_run_page(run).read_text(encoding="utf-8")
    check_self_contained(text)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    reader = Reader(text)
    assert [line for line in reader.texts if line in HEADINGS] == HEADINGS
    assert f"{result['global_accuracy']:.1%}" in reader.texts
    for sentence in result["conclusion"]:
        assert sentence in reader.texts
    for label in ("accuracy of the global model", "loss, nats", "droppeft: clients that sent"):
        assert any(part.startswith(label) for part in reader.texts), label
    for name in ("food", "music", "space"):
        assert reader.texts.count(name) >= 3  # above, beside the matrix, and among the scores
    assert text.count('class="right"') == sum(result["confusion"][one][one] > 0 for one in range(3))
    assert "training.local_steps=2\n" in text
    assert "Most confident mistakes" not in text
    assert write_run_page(run).read_text(encoding="utf-8") == text


def test_mistakes_are_shown_if_they_are_kept(run: Path) -> None:
    one = {"text": "<i>bread</i>", "pair": "salt", "true": "food", "predicted": "music"}
    (run / "mistakes.jsonl").write_text(json.dumps({**one, "probability": 0.987}) + "\n")
    assert "bread" not in write_run_page(run).read_text()  # left by a run that kept them
    rewrite(run, "result.json", lambda result: result["config"]["evaluation"].update(mistakes=1))
    reader = Reader(write_run_page(run).read_text())
    assert {"<i>bread</i>", "salt", " with probability\n98.7%; true class "} <= {*reader.texts}
    (run / "mistakes.jsonl").write_text('{"text": "bread"}\n')
    with refused("mistakes.jsonl: is damaged"):
        write_run_page(run)


def test_a_run_without_clock_global_model_and_figures(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one over Flower with models of the clients alone, on a server without matplotlib."""

    def without(values: dict[str, Any]) -> None:
        for key in values:
            if "modelled" in key or key.startswith(("global_", "best_", "first_")):
                values[key] = None
        for key in ("profile", "client_modelled_s", "download_modelled_s", "confusion"):
            values.pop(key, None)

    for name in ("result.json", "rounds.jsonl", "clients.jsonl"):
        rewrite(run, name, without)
    rewrite(run, "result.json", lambda result: result.update(no_clock_reason="no <profiles>"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_run_page(run).read_text()
    assert "pip install 'droppeft[report]'" in text
    assert "<svg" not in text
    assert "of the clients&#39; own models on their own test texts" in text
    assert "no &lt;profiles&gt;" in text
    assert "Confusion" not in text


def test_clients_that_were_left_out_are_named(run: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        row["late"] = [3] if row["round"] > 1 else []
        row["failures"] = [{"client": 2, "reason": f"sent <{row['round']}>"}]

    rewrite(run, "rounds.jsonl", change)
    texts = Reader(write_run_page(run).read_text()).texts
    for reason, times, client in (("late on", "2", "3"), ("not merged: sent <1>", "3", "2")):
        [place] = [at for at, text in enumerate(texts) if text.startswith(reason)]
        assert texts[place + 1 : place + 3] == [times, client]


def test_ten_thousand_clients_fit_on_a_page(whole_run: Path) -> None:
    [row, *_] = rows_of(whole_run / "clients.jsonl")
    rows = [{**row, "client": client, "profile": f"p{client % 3}"} for client in range(9000)]
    rows += [{**rows[5], "accepted": False}]
    found = client_activity.totals_by_client(rows, {"metric": "accuracy", "personalised": []})
    table = client_activity.spread(found, ACCURACY)
    assert len(table.rows) < 10
    assert table.rows[0][:2] == ("rounds merged", "9,000")
    assert len(client_activity.by_device(found).rows) == 3
    [first, *_] = rows_of(whole_run / "rounds.jsonl")
    rounds = [replace(RoundRow.from_columns(first), cohort=[*range(9001)], accepted=9000)]
    assert client_activity.participation(rounds, found, 10_000) == (
        "9,000 of 10,000 clients took part, each in 1 round. 9,000 of 9,001 updates were merged."
    )
    late = client_activity.left_out([replace(rounds[0], late=[*range(100)])])
    assert ("late on the modelled clock, not merged", "100", "0, 1, 2, 3, 4 and 95 others") in [
        *late.rows
    ]


def test_a_matrix_of_many_classes_is_folded_away_or_left_out() -> None:
    def shown(classes: int) -> Any:
        counts = [[int(row == column) for column in range(classes)] for row in range(classes)]
        names = [f"class {number}" for number in range(classes)]
        return confusion_table({"class_names": names, "confusion": counts})

    assert [shown(classes).is_open for classes in (OPEN, OPEN + 1)] == [True, False]
    assert len(shown(OPEN + 1).folded.rows) == 1
    assert shown(LARGEST + 1).matrix is None
    assert not shown(2).pairs.rows
    assert confusion_table({}) is None


def test_a_page_that_cannot_be_written_is_a_sentence(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "rounds.jsonl").write_text("damaged\n")
    PageWriter(run).finished({})
    said = capsys.readouterr().err
    assert said.startswith("droppeft: the page of the run could not be written (")
    assert said.endswith(f"; try again with: droppeft report '{run}'\n")
    assert said.count("\n") == 1
    assert not (run / "report.html").exists()


def test_a_folder_without_a_finished_run_is_refused(whole_run: Path, tmp_path: Path) -> None:
    with refused("holds no finished run"):
        write_run_page(tmp_path)
    assert list(tmp_path.iterdir()) == []
    result = result_of(whole_run) | {"schema_version": 3}
    (tmp_path / "result.json").write_text(json.dumps(result))
    with refused("was written by another version of droppeft"):
        write_run_page(tmp_path)
