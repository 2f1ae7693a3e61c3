"""Predicting the rows of a file gives what the run measured, and mistakes are one sentence."""

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from chats import chat_settings
from droppeft.config import load_config
from droppeft.report.predicted_file import predict_file
from droppeft.runs.predicting import load_predictor
from droppeft.server.run import start_run
from refusals import refused
from runs import Recorder

Printed = Callable[..., str]


@pytest.fixture
def predict(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> Printed:
    """Predict with the finished run; returns what was printed."""

    def call(*arguments: Any, **options: Any) -> str:
        predict_file(whole_run, *arguments, **options)
        return capsys.readouterr().out

    return call


@pytest.fixture
def test_split(tiny_overrides: list[str]) -> Path:
    return Path(tiny_overrides[1].partition("=")[2]) / "test.csv"


def test_the_test_split_has_the_accuracy_of_the_result(
    predict: Printed, whole_run: Path, test_split: Path, tmp_path: Path
) -> None:
    printed = predict(test_split, tmp_path / "out.csv", all_probabilities=True)
    result = json.loads((whole_run / "result.json").read_text())
    assert f"accuracy {result['global_accuracy']:.1%} on the 60 rows with a label in the" in printed
    assert re.search(r"^food +20 ", printed, re.M)
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    with test_split.open() as file:
        before = list(csv.DictReader(file))
    assert [{"text": r["text"], "label": r["label"]} for r in rows] == before
    right = [row["predicted"] == row["label"] for row in rows]
    assert sum(right) / 60 == pytest.approx(result["global_accuracy"])
    for row in rows:
        each = {name: float(row[f"probability of {name}"]) for name in ("food", "music", "space")}
        assert max(each, key=each.__getitem__) == row["predicted"]
        assert float(row["probability"]) == each[row["predicted"]]
        assert sum(each.values()) == pytest.approx(1, abs=1e-5)


def test_losses_of_a_model_with_a_base_delta_are_those_of_the_run(
    tiny_overrides: list[str], test_split: Path, tmp_path: Path
) -> None:
    words = [w for w in tiny_overrides if not w.startswith(("method=", "dropout."))]
    words += ["method=fedex_lora", "training.learning_rate=0.02", "rounds=2"]
    result = start_run(load_config(None, words), tmp_path / "run", Recorder())
    predictor = load_predictor(tmp_path / "run", lambda step: None)
    with test_split.open() as file:
        rows = list(csv.DictReader(file))
    found = predictor.probabilities([row["text"] for row in rows])
    places = [predictor.label_names.index(row["label"]) for row in rows]
    losses = [-math.log(p[place]) for p, place in zip(found, places, strict=True)]
    assert sum(losses) / 60 == pytest.approx(result["global_loss"], abs=1e-6)


def test_other_files_and_names(predict: Printed, tmp_path: Path) -> None:
    texts = ["bread apple", "moon star"]
    table = pa.table({"Body": texts, "tags": [["a"], []], "label": ["food", "fish"]})
    pyarrow.parquet.write_table(table, tmp_path / "new.parquet")
    printed = predict(tmp_path / "new.parquet", tmp_path / "out.jsonl", text=["body"])
    assert "No accuracy from the column label: 'fish' is not a class of the run." in printed
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["Body"] for row in rows] == texts
    assert rows[0]["tags"] == ["a"]
    predict(tmp_path / "new.parquet", tmp_path / "out.parquet", text=["body"])
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows
    with refused(r"holds values that a .csv file cannot, .* write a .jsonl or .parquet file"):
        predict(tmp_path / "new.parquet", None, text=["body"])
    assert not (tmp_path / "new-predicted.csv").exists()


def test_rows_without_a_text_and_another_column(predict: Printed, tmp_path: Path) -> None:
    texts = ["bread apple " * 30, "  ", *["bread"] * 10, ""]
    table = pa.table({"body": texts, "label": ["food", "music", *["food"] * 11]})
    pyarrow.parquet.write_table(table, tmp_path / "new.parquet")
    printed = predict(tmp_path / "new.parquet", tmp_path / "out.jsonl")
    assert "text ← body, since new.parquet has no column text (--text chooses another)" in printed
    assert "5 of 13 rows:" in printed
    assert re.search(r"^bread apple .*… +\w+ +1?\.\d+$", printed, re.M)
    assert "2 rows have no text and no prediction." in printed
    assert re.search(r"all 11 rows are \w+; the model may have learnt little", printed)
    assert "on the 11 rows with a label" in printed
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 13
    for name in ("predicted", "probability"):
        assert [row[name] is None for row in rows] == [not text.strip() for text in texts]


@pytest.mark.parametrize(
    ("content", "out", "message"),
    [
        ("text\nbread\n", "out.xls", r"must end with one of .csv, .jsonl, .parquet"),
        ("text\nbread\n", "there.csv", r"there.csv: exists already; .* --out"),
        ("text\nbread\n", "no/out.csv", r"its folder does not exist"),
        ('text,n\n"",1\n"  ",2\n', "out.csv", r"new.csv: text is empty in every row"),
        ("words\nbread\n", "out.csv", r"no column text, only words; .* --text"),
        ("text,predicted\nbread,x\n", "out.csv", r"has a column predicted already; rename"),
    ],
)
def test_mistakes_are_refused(
    content: str, out: str, message: str, predict: Printed, tmp_path: Path
) -> None:
    (tmp_path / "new.csv").write_text(content)
    (tmp_path / "there.csv").write_text("")
    with refused(message):
        predict(tmp_path / "new.csv", tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"new.csv", "there.csv"}


def test_a_run_that_writes_texts_is_refused(tmp_path: Path) -> None:
    words = [*chat_settings(tmp_path), "rounds=1", "evaluation.generated=0"]
    words += ["evaluation.personalised=false"]
    start_run(load_config(None, words), tmp_path / "run", Recorder())
    with refused("which writes texts; use generate"):
        load_predictor(tmp_path / "run", lambda step: None)


def test_named_columns_must_exist_and_be_as_many_as_in_training(
    predict: Printed, tmp_path: Path
) -> None:
    file = tmp_path / "new.csv"
    file.write_text("text,body\nbread,moon\n")
    with refused("no column boddy, only text, body; name the column with --text"):
        predict(file, None, text=("boddy",))
    with refused(r"--text text,body: the model was trained on texts from 1 column \(text\)"):
        predict(file, None, text=("text", "body"))


def test_outputs_that_are_not_finite_are_no_prediction(whole_run: Path) -> None:
    predictor = load_predictor(whole_run, lambda step: None)
    with torch.no_grad():
        for value in predictor.source.client_model.parameters[1].values():
            value.fill_(math.nan)
    with refused("the model's outputs are not finite, because its training diverged"):
        predictor.probabilities(["bread"])
