"""What a run prints on a terminal with 80 columns."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from droppeft.report.screen import JsonLines, Quiet, Screen
from droppeft.runs.ledger import RoundRow
from runs import rows_of

WIDTH = 80


@pytest.fixture
def result(whole_run: Path) -> dict[str, Any]:
    return dict(json.loads((whole_run / "result.json").read_text()))


@pytest.fixture
def rows(whole_run: Path) -> list[RoundRow]:
    return [RoundRow.from_columns(row) for row in rows_of(whole_run / "rounds.jsonl")]


HERE = {"expected_wall_s": 1.0, "workers": 2, "why_fewer_workers": None}
"""What a run knows of this machine before round 1."""


def shown(
    about: dict[str, Any], rows: list[RoundRow], earlier: int = 0, expected_s: float | None = None
) -> str:
    """Show a run to a recording console and return the text."""
    console = Console(width=WIDTH, file=io.StringIO(), record=True)
    with Screen(console, Path("runs/mine")) as screen:
        screen.preparing("reading data")
        screen.started({**about, **HERE, "expected_wall_s": expected_s}, rows[:earlier])
        for row in rows[earlier:]:
            for _ in row.cohort:
                screen.replied(None)
            screen.round_done(row)
        screen.preparing("measuring on the whole test set")
        screen.finished(about)
    text = console.export_text()
    assert all(len(line) <= WIDTH for line in text.splitlines())
    return text


def line_with(text: str, start: str) -> str:
    found = [line for line in text.splitlines() if line.strip().startswith(start)]
    assert len(found) == 1, text
    return found[0]


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        ({}, None),
        ({"fraction": 0.5, "criterion": "cka"}, "50% of the layers are shared, by cka"),
        ({"head": "personal"}, "the head is personal"),
    ],
)
def test_the_header_says_what_is_shared(
    result: dict[str, Any], rows: list[RoundRow], sharing: dict[str, Any], expected: str | None
) -> None:
    config = result["config"]
    changed = {**config, "sharing": {**config["sharing"], **sharing}}
    text = shown({**result, "config": changed}, rows)
    found = [line for line in text.splitlines() if line.startswith("sharing")]
    assert (expected in found[0]) if expected else not found


def test_header_rounds_and_result(result: dict[str, Any], rows: list[RoundRow]) -> None:
    text = shown({**result, "model": "builtin", "data": "builtin"}, rows)
    assert "droppeft · droppeft · seed 0" in text
    assert "method   layer dropout per mini-batch" in text
    assert "model    built in: 4 layers, 1.0 M parameters, 4,195 of adapters and head" in text
    assert "data     built in: 180 texts to train and 60 to test, 3 classes" in text
    assert "clients  4 clients; classes spread unevenly (Dirichlet, alpha 1)" in text
    assert "rounds   3; in each, 2 clients train for 2 steps of 4 texts" in text
    assert "devices  jetson_tx2, jetson_xavier_nx, jetson_agx_xavier (modelled)" in text
    assert "results  runs/mine" in text
    [head] = [line for line in text.splitlines() if line.endswith("measured    modelled")]
    assert head.split() == ["accuracy", "train", "loss", "depth", "measured", "modelled"]
    for row in rows:
        line = line_with(text, f"round {row.round}")
        assert (
            f"round {row.round}  {row.quality['global_accuracy']:.3f} ━".replace("0.", ".") in line
        )
        seconds = [f"{value:.1f} s" for value in (row.host_wall_s, row.round_modelled_s)]
        for column, value in zip(
            ("loss", "depth", "measured", "modelled"),
            (f"{row.train_loss:.3f}", "3.00/4", *seconds),
            strict=True,
        ):
            assert line[: head.index(column) + len(column)].endswith(value)
    [accuracy] = [line for line in text.splitlines() if "all 60 test texts" in line]
    assert "accuracy" in accuracy
    modelled = f"{sum(row.round_modelled_s or 0 for row in rows):.1f} s"
    assert modelled in line_with(text, "modelled time")
    assert f"{result['energy_modelled_j']:.1f} J" in line_with(text, "energy")
    assert "of 4 layers per step" in line_with(text, "mean depth")
    assert "target" not in text


def test_over_selection_and_a_missing_clock_are_in_the_header(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    text = shown({**result, "drawn_size": 3, "no_clock_reason": "it cannot be counted"}, rows)
    assert "3; in each, 3 clients (the first 2 are merged) train for 2 steps" in text
    assert "devices  it cannot be counted" in text
    assert "jetson" not in text


def test_the_expected_time_is_shown_if_it_is_known(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    assert "time     about 3 minutes on this machine" in shown(result, rows, expected_s=170.0)
    assert "time     less than a minute" in shown(result, rows, expected_s=5.0)
    assert "minutes on this machine" not in shown(result, rows)


def test_without_a_terminal_the_remaining_time_is_a_line_after_the_first_round(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    slow = [replace(row, host_wall_s=60.0) for row in rows]
    text = shown(result, slow)
    assert text.count("rounds left") == 1
    assert "2 rounds left, about 2 minutes" in text
    assert text.index("round 1 ") < text.index("2 rounds left") < text.index("round 2 ")


def test_without_a_terminal_there_are_no_control_characters(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    file = io.StringIO()
    with Screen(Console(width=WIDTH, file=file), Path("runs/mine")) as screen:
        screen.preparing("reading data")
        screen.started({**result, **HERE}, [])
        for row in rows:
            screen.replied(None)
            screen.round_done(row)
        screen.finished(result)
    text = file.getvalue()
    assert text.startswith("reading data …\n")
    assert not [character for character in text if ord(character) < 32 and character != "\n"]


def test_a_run_ends_with_a_conclusion_and_what_to_type_next(
    result: dict[str, Any], rows: list[RoundRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.argv", [".venv/bin/droppeft", "run"])
    built_in = {**result, "model": "builtin", "data": "builtin"}
    text = shown(built_in, rows)
    _, _, end = text.partition("Conclusion\n")
    words = " ".join(end.split())
    assert f"The {len(rows)} rounds took " in words
    assert words.startswith(" ".join(result["conclusion"]))
    assert re.findall(r"\.venv/bin/droppeft (\w+ [^:]*?)(?= [A-Z]|$)", words) == [
        "export runs/mine --merge",
        "compare droppeft fedlora rounds=3 clients=4 cohort_size=2 partition.min_rows=6 "
        "training.local_steps=2 training.batch_size=4 evaluation.rows=20",
        "run data=FILE.csv",
    ]
    assert "--merge" not in shown({**built_in, "global_accuracy": None}, rows)
    assert "\n  The round took " in shown({**built_in, "rounds": 1}, rows)


def test_what_to_type_next_after_a_language_model(
    result: dict[str, Any], rows: list[RoundRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that ended without generated texts."""
    monkeypatch.setattr("shutil.which", lambda name: name)
    about = {"task": "causal_lm", "data": "builtin", "global_loss": 1.0, "initial_loss": 2.0}
    found = {model: shown({**result, **about, "model": model}, rows) for model in ("smollm2", "m")}
    assert "droppeft compare droppeft fedlora model=smollm2 " in found["smollm2"]
    assert "droppeft compare droppeft fedlora task=causal_lm model=m " in found["m"]
    for text in found.values():
        assert "droppeft chat runs/mine" in text
        assert "in columns named prompt and completion:" in text
        assert "droppeft run data=FILE.jsonl" in text
        assert "FILE.csv" not in text


def test_what_to_type_next_has_the_data_of_the_run(
    result: dict[str, Any], rows: list[RoundRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    source = {"text": ["one", "two"], "label": "kind"}
    config = {**result["config"], "source": source}
    text = shown({**result, "config": config, "model": "mpnet", "data": "my news.csv"}, rows)
    words = " ".join(text.split())
    assert "droppeft compare droppeft fedlora model=mpnet 'data=my news.csv' " in words
    assert "source.text=one,two source.label=kind partition.min_rows=6" in words
    assert "FILE.csv" not in text


def test_names_that_are_too_long_for_a_line(result: dict[str, Any], rows: list[RoundRow]) -> None:
    long = "/a/folder/with/a/name" * 8
    text = shown({**result, "model": long, "data": long}, rows)
    assert len([line for line in text.splitlines() if line.startswith("round ")]) == len(rows)


def test_a_target_that_was_reached(result: dict[str, Any], rows: list[RoundRow]) -> None:
    reached = {"target": 0.85, "target_round": 2, "time_to_target_measured_s": 83.0}
    text = shown({**result, **reached, "time_to_target_modelled_s": 7.25}, rows)
    line = line_with(text, "target .850")
    assert "1 min 23 s" in line
    assert "round 2; as if clients ran in parallel" in line
    assert "7.2 s" in line_with(text, "7.2 s   on their profiles")


def test_a_target_that_was_not_reached(result: dict[str, Any], rows: list[RoundRow]) -> None:
    missed = {"target": 0.85, "target_round": None, "time_to_target_measured_s": None}
    assert "not reached" in line_with(shown({**result, **missed}, rows), "target .850")


def test_a_round_that_was_not_evaluated(result: dict[str, Any], rows: list[RoundRow]) -> None:
    silent = replace(
        rows[0],
        quality=dict.fromkeys(rows[0].quality),
        train_loss=None,
        mean_active_layers=None,
    )
    text = shown({**result, "first_accuracy": None, "mean_active_layers": None}, [silent])
    line = line_with(text, "round 1")
    assert line.split()[2:5] == ["–", "–", "–/4"]
    # Its columns are aligned with those of an evaluated round.
    measured = line_with(shown(result, rows[:1]), "round 1")
    assert line.index("–/4") + 3 == measured.index("3.00/4") + 6


def test_depth_counts_the_layers_above_the_frozen_ones(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    config = {**result["config"], "frozen": {**result["config"]["frozen"], "layers": 1}}
    text = shown({**result, "config": config}, rows)
    assert "3.00/3" in line_with(text, "round 1")
    assert "of 3 layers above the frozen ones per step" in line_with(text, "mean depth")


def test_f1_says_which_it_is(result: dict[str, Any], rows: list[RoundRow]) -> None:
    assert "mean over classes (macro)" in line_with(shown({**result, "classes": 3}, rows), "F1")
    assert "of class 1" in line_with(shown({**result, "classes": 2}, rows), "F1")


def test_failures_are_shown(result: dict[str, Any], rows: list[RoundRow]) -> None:
    failing = replace(rows[0], failures=[{"client": 7, "reason": "refused: its loss is infinite"}])
    text = shown(result, [failing])
    assert "client 7: refused: its loss is infinite" in text


def test_a_round_says_which_layers_were_trained_and_what_is_best(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    labels = {"0": "all layers", "3": "upper 50% of the layers"}
    tried = {"present": [3, 0], "trials": [2, 1]}
    notes = {"chosen": {"1": 3, "2": 0, "5": 3}, "labels": labels, "best": 0, **tried}
    text = shown(result, [replace(rows[0], notes=notes)])
    assert (
        shown(result, [replace(rows[0], notes=notes), replace(rows[1], notes=notes)]).count(
            "trained:"
        )
        == 1
    )  # the best arm is the same
    expected = (
        "trained: upper 50% of the layers by 2 clients; all layers by 1 client "
        "(best so far: all layers)"
    )
    assert expected in " ".join(text.split())
    assert "\n         trained: upper 50%" in text
    assert "trained:" not in shown(result, rows)
    untried = {**notes, "chosen": {"1": 3}, "trials": [2, 0]}
    expected = "(expected to be best, but not tried lately: all layers)"
    assert expected in " ".join(shown(result, [replace(rows[0], notes=untried)]).split())
    config = {**result["config"], "frozen": {**result["config"]["frozen"], "layers": 2}}
    text = shown({**result, "config": config}, [replace(rows[0], notes=notes)])
    assert "trained above 2 frozen layers: upper 50%" in text


def test_without_a_global_model_there_is_one_accuracy(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    own = {
        "personalised_accuracy": 0.5,
        "personalised_worst_tenth": 0.25,
        "personalised_deviation": 0.125,
        "personalised_lost": [4, 5],
        "personalised_clients": 11,
        "personalised_rows": 55,
        "personalised_failures": [{"client": 3, "reason": "asleep"}],
        "own_majority_accuracy": 0.4375,
    }
    text = shown({**result, "global_accuracy": None, "test_rows": 0, **own}, rows)
    assert "–   there is no global model" in text
    assert ".500" in line_with(text, "personalised")
    assert "of them: 2 clients" in line_with(text, "worst tenth")
    assert ".125" in line_with(text, "deviation")
    assert ".438" in line_with(text, "own majority class")
    unmeasured = (
        "1 could not be evaluated (asleep); 2 had lost their client state and used the global"
    )
    assert unmeasured in " ".join(text.split())


def test_clients_left_out_on_the_modelled_clock_are_named(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    text = shown(result, [replace(rows[0], absent=[3], late=[0, 7], surplus=[])])
    assert "         on the modelled clock: absent 3; late 0, 7\n" in text


def test_clients_whose_updates_were_bounded_are_named(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    text = shown(result, [replace(rows[0], clipped=[3], limited=[0, 7])])
    assert "         changes clipped of client 3; weights limited of clients 0, 7\n" in text
    text = shown(result, [replace(rows[0], set_aside=[0, 1])])
    assert "         set aside by server.merge: clients 0, 1\n" in text
    text = shown(result, [replace(rows[0], opposed=[4])])
    assert "         left out by server.direction_check: client 4\n" in text


def test_a_round_without_a_modelled_clock(result: dict[str, Any], rows: list[RoundRow]) -> None:
    unclocked = replace(rows[0], absent=None, round_modelled_s=None, energy_modelled_j=None)
    text = shown({**result, "round_modelled_s": None, "energy_modelled_j": None}, [unclocked])
    assert line_with(text, "round 1").endswith(f"{unclocked.host_wall_s:.1f} s           –")
    assert "–" in line_with(text, "energy")


def test_a_continued_run_says_after_which_round(
    result: dict[str, Any], rows: list[RoundRow]
) -> None:
    text = shown(result, rows, earlier=2)
    assert "continuing after round 2" in text
    assert [line[:7] for line in text.splitlines() if line.startswith("round ")] == ["round 3"]


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (7e10, "70.0 GB")]
)
def test_bytes_are_shown_with_a_unit(
    result: dict[str, Any], rows: list[RoundRow], count: float, text: str
) -> None:
    assert text in line_with(shown({**result, "upload_bytes": count}, rows), "upload")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61.0, "1 min 01 s"), (3599.0, "59 min 59 s")],
)
def test_seconds_are_shown_as_minutes(
    result: dict[str, Any], rows: list[RoundRow], seconds: float, text: str
) -> None:
    assert text in line_with(shown({**result, "host_wall_s": seconds}, rows), "time")


@pytest.fixture
def of_loss(result: dict[str, Any]) -> dict[str, Any]:
    """The result of a task whose metrics are loss and perplexity and that has no references."""
    words = ("accuracy", "_f1", "tenth", "deviation")
    rest = {key: value for key, value in result.items() if not key.endswith(words)}
    values = {"global": 1.25, "initial": 4.0, "first": 3.0, "best": 1.2, "personalised": 1.5}
    own = {"personalised_worst_tenth": 2.5, "personalised_deviation": 0.5}
    named = {f"{whose}_loss": value for whose, value in values.items()}
    about = {"task": "causal_lm", "metric": "loss", "global_perplexity": 3.49}
    return {**rest, **named, **own, **about}


def test_a_run_whose_metric_is_a_loss(of_loss: dict[str, Any], rows: list[RoundRow]) -> None:
    values = (4.0, 2.0, None)
    measured = [
        replace(row, quality={"global_loss": value, "global_perplexity": 2.0})
        for row, value in zip(rows, values, strict=True)
    ]
    missed = {"target": 1.125, "target_round": None, "time_to_target_measured_s": None}
    text = shown({**of_loss, **missed}, measured)
    words = " ".join(text.split())
    assert "to beat the model before training, loss 4.000" in words
    [head] = [line for line in text.splitlines() if line.endswith("measured    modelled")]
    assert head.split() == ["loss", "train", "loss", "depth", "measured", "modelled"]
    whole, half, none = (line_with(text, f"round {number}").count("━") for number in (1, 2, 3))
    assert (half, none) == (whole // 2, 0)
    assert whole > 10
    assert "round 1  4.000  ━" in text
    assert "1.250   all 60 test texts" in line_with(text.partition("Result")[2], "loss  ")
    assert "3.490" in line_with(text, "perplexity")
    assert "3.000" in line_with(text, "after round 1")
    assert "1.200" in line_with(text, "best")
    assert "4.000" in line_with(text, "before training")
    assert "2.500" in line_with(text, "worst tenth")
    assert "not reached" in line_with(text, "target 1.125")
    for absent in ("accuracy", "F1", "3 classes", "majority class", "head", "TF-IDF"):
        assert absent not in text.partition("Conclusion")[0], absent


def test_scores_of_texts_of_clients_own_models(
    of_loss: dict[str, Any], rows: list[RoundRow]
) -> None:
    """One client has no prompts; nothing equals a reference."""
    own = [{"client": 0, "texts": 8}, {"client": 1}, {"client": 2, "texts": 4}]
    scores = {"personalised_rouge_l": 0.25, "personalised_chrf": 0.5}
    result = {**of_loss, **scores, "personalised_exact_match": 0.0, "personalised": own}
    text = shown(result, rows)
    assert ".250   mean of 2 clients' own models" in line_with(text, "personalised ROUGE-L")
    assert ".500" in line_with(text, "personalised chrF")
    assert "which wrote 12 texts" in " ".join(text.split())
    assert "exact match" not in text
    assert "ROUGE-L" not in shown(of_loss, rows)


def test_quiet_names_the_metric(
    of_loss: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Quiet().finished(of_loss)
    assert capsys.readouterr().out == "loss 1.2500, personalised 1.5000\n"


def test_quiet_prints_one_line(
    result: dict[str, Any], rows: list[RoundRow], capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = Quiet()
    quiet.preparing("reading data")
    quiet.started(result, [])
    quiet.round_done(rows[0])
    quiet.finished({**result, "global_accuracy": 0.75, "personalised_accuracy": 0.5})
    assert capsys.readouterr().out == "accuracy 0.7500, personalised 0.5000\n"
    quiet.finished({**result, "global_accuracy": None, "personalised_accuracy": 0.5})
    assert capsys.readouterr().out == "personalised 0.5000\n"


def test_json_lines_are_the_rows_and_the_result(
    result: dict[str, Any],
    rows: list[RoundRow],
    capsys: pytest.CaptureFixture[str],
    whole_run: Path,
) -> None:
    lines = JsonLines()
    lines.started(result, [])
    for row in rows:
        lines.round_done(row)
    lines.finished(result)
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    saved = rows_of(whole_run / "rounds.jsonl")
    assert expected == [
        *({"event": "round", **row} for row in saved),
        {"event": "result", **result},
    ]
