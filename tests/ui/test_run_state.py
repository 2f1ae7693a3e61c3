"""What the page of runs knows of runs that go on, have stopped, or are finished."""

import json
import os
import shutil
from pathlib import Path

import pytest

from droppeft.runs.folder import locked
from droppeft.ui.curves import draw_curves
from droppeft.ui.dashboard import cards, choose, look, metric_labels, ticked_at_first
from droppeft.ui.run_state import client_table, curve, facts, find_runs, read_state, sentence
from refusals import refused


@pytest.fixture
def runs(whole_run: Path, tmp_path: Path) -> Path:
    """A folder with a finished run, and one of a comparison that was stopped after two rounds."""
    shutil.copytree(whole_run, tmp_path / "first")
    stopped = tmp_path / "compare-x" / "second"
    shutil.copytree(whole_run, stopped)
    (stopped / "result.json").unlink()
    cut_ledger(stopped, rounds=2)
    os.utime(tmp_path / "first" / "config.toml", (1, 1))
    return tmp_path


def cut_ledger(run: Path, rounds: int) -> None:
    """Leave the rows of the first rounds, and a next one that is only half written."""
    for name in ("rounds.jsonl", "clients.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["round"] <= rounds]
        after = "".join(lines[len(kept) :])
        (run / name).write_text("".join(kept) + after[: len(after) // 3].rstrip("\n"))


def test_runs_are_found_in_a_folder_in_comparisons_and_by_themselves(runs: Path) -> None:
    (runs / ".new.abc" / "run" / "checkpoints").mkdir(parents=True)
    (runs / ".new.abc" / "run" / "config.toml").write_text("")
    (runs / "other").mkdir()
    (runs / "other" / "config.toml").write_text("of = 'another program'")
    assert list(find_runs(runs)) == ["compare-x/second", "first"]
    assert list(find_runs(runs / "compare-x")) == ["second"]
    assert list(find_runs(runs / "first")) == ["first"]
    with refused("none: there is no such folder; name the folder of your runs, or start a run"):
        find_runs(runs / "none")


def test_a_finished_run(runs: Path) -> None:
    state = read_state(runs / "first")
    result = json.loads((runs / "first" / "result.json").read_text())
    assert state.stage == "finished"
    assert sentence(state) == "finished after 3 rounds"
    assert list(state.conclusion) == result["conclusion"]
    shown = dict(facts(state))
    assert list(shown)[:3] == ["accuracy", "train loss", "modelled time"]
    assert shown["accuracy"] == f"{state.rows[-1].quality['global_accuracy']:.3f}".lstrip("0")
    assert [cells[0] for cells in client_table(state)] == list(map(str, state.rows[-1].cohort))


def test_a_run_with_a_half_written_row_goes_on_or_has_stopped(runs: Path) -> None:
    run = runs / "compare-x" / "second"
    state = read_state(run)
    assert (state.stage, len(state.rows)) == ("stopped", 2)
    assert {row["round"] for row in state.clients} == {2}
    assert sentence(state) == f"stopped after round 2 of 3; go on with: droppeft resume {run}"
    with locked(run):
        state = read_state(run)
        assert state.stage == "running"
        assert sentence(state).startswith("round 3 of 3 goes on (round 2 ended at ")
        assert sentence(state).endswith("; less than a minute left for the rounds")
    assert read_state(run).stage == "stopped"


def test_a_new_row_is_seen_and_time_is_added_up(runs: Path, whole_run: Path) -> None:
    run = runs / "compare-x" / "second"
    assert [x for x, _ in curve(read_state(run), "train_loss", "round")] == [1, 2]
    shutil.copy(whole_run / "rounds.jsonl", run / "rounds.jsonl")
    state = read_state(run)
    assert [x for x, _ in curve(state, "global_accuracy", "round")] == [1, 2, 3]
    [*_, (elapsed_s, _)] = curve(state, "train_loss", "modelled time")
    assert elapsed_s == pytest.approx(sum(row.round_modelled_s or 0.0 for row in state.rows))


def test_a_run_that_cannot_be_read_does_not_hide_the_others(runs: Path) -> None:
    broken = runs / "first" / "rounds.jsonl"
    broken.write_text("no row\n" + broken.read_text())
    first, second = cards(find_runs(runs), ["first", "compare-x/second"])
    assert (first["stage"], second["stage"]) == ("unreadable", "stopped")
    assert first["sentence"].startswith(f"{broken}: line 1 is damaged")
    assert metric_labels([second["state"]])[0] == "accuracy"
    drawn = draw_curves(
        [(card["name"], card["state"]) for card in (first, second)], "train_loss", "loss", "round"
    )
    assert ">second<" in drawn
    assert ">first<" not in drawn


def test_runs_that_go_on_are_ticked_and_so_are_those_that_begin_later(runs: Path) -> None:
    found = look(find_runs(runs), ())
    assert ticked_at_first(found) == ["compare-x/second"]  # the last one, since none goes on
    with locked(runs / "first"):
        (runs / "first" / "result.json").unlink()
        found = look(find_runs(runs), ())
    assert ticked_at_first(found) == ["first"]
    assert choose(found, ["deleted", "compare-x/second"], ["compare-x/second"]) == [
        "compare-x/second",
        "first",
    ]
    assert choose(found, [], list(found.names)) == []


def test_an_unfinished_ledger_of_another_version_is_named(runs: Path) -> None:
    rounds = runs / "first" / "rounds.jsonl"
    row = json.loads(rounds.read_text().splitlines()[0])
    del row["cohort"]
    rounds.write_text(json.dumps(row) + "\n")
    with refused("lacks cohort"):
        read_state(runs / "first")
