"""droppeft in Python does what the command line does, with data and models in memory too."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import droppeft
from chats import chat_settings
from droppeft.cli import main
from droppeft.config import load_config
from droppeft.config.schema import Config
from droppeft.methods import METHODS
from droppeft.models.in_memory import save_model
from droppeft.server.run import start_run
from refusals import refused
from runs import Recorder, rows_of

QUICK: dict[str, Any] = {
    "progress": False,
    "method": "fedlora",
    "rounds": 2,
    "clients": 3,
    "cohort_size": 2,
    "threads": 1,
    "accelerator": "cpu",
    "training": {"local_steps": 2, "batch_size": 4},
    "partition": {"min_rows": 6},
    "evaluation": {"rows": 20},
}


@pytest.fixture(scope="module")
def model(tiny_overrides: list[str]) -> str:
    return tiny_overrides[0].partition("=")[2]


@pytest.fixture(scope="module")
def rows(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single CSV file with 180 rows."""
    source = Path(tiny_overrides[1].partition("=")[2]) / "train.csv"
    return Path(shutil.copy(source, tmp_path_factory.mktemp("rows") / "rows.csv"))


@pytest.fixture(scope="module")
def result(rows: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> droppeft.Result:
    out = tmp_path_factory.mktemp("result") / "run"
    return droppeft.run(rows, model=model, out=out, **QUICK)


def adapter_of(result: droppeft.Result) -> str:
    return str(result.result["adapter_sha256"])


def test_importing_droppeft_loads_neither_torch_nor_pandas() -> None:
    code = (
        "import droppeft, sys; droppeft.DroppeftError; print({'torch', 'pandas'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_settings_are_those_of_a_configuration() -> None:
    named = {"data", "model", "method"}
    assert droppeft.Settings.__annotations__.keys() == Config.model_fields.keys() - named


# One result, whoever starts the run and wherever the rows are


def test_the_command_line_gives_the_same_adapter(
    result: droppeft.Result, rows: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method=fedlora", "rounds=2", "clients=3", "cohort_size=2", "threads=1"]
    words += ["accelerator=cpu", "training.local_steps=2", "training.batch_size=4"]
    words += ["partition.min_rows=6", "evaluation.rows=20", f"data={rows}", f"model={model}"]
    arguments = ["droppeft", "run", "--quiet", "--out", str(tmp_path / "run"), *words]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    theirs = droppeft.load(tmp_path / "run")
    assert adapter_of(theirs) == adapter_of(result)
    config = (tmp_path / "run" / "config.toml").read_bytes()
    assert config == (result.folder / "config.toml").read_bytes()


@pytest.mark.sample("DataFrame", "columns")
@pytest.mark.parametrize("kind", ["DataFrame", "Dataset", "rows", "columns", "thread and test"])
def test_the_same_rows_in_memory_give_the_same_adapter(
    kind: str, result: droppeft.Result, rows: Path, model: str, tmp_path: Path
) -> None:
    frame = pd.read_csv(rows)
    frame.index += 7  # an index is no column
    data = {
        "DataFrame": frame,
        "Dataset": datasets.Dataset.from_pandas(frame, preserve_index=False),
        "rows": frame.to_dict("records"),
        "columns": frame.to_dict("list"),
    }
    found: list[droppeft.Result] = []

    def work() -> None:
        given = data.get(kind, frame)
        found.append(droppeft.run(given, model=model, out=tmp_path / "run", **QUICK))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    [same] = found
    assert adapter_of(same) == adapter_of(result)
    [written] = (tmp_path / "droppeft-data").glob("*/rows.parquet")
    assert same.result["data"] == str(written)


def test_a_loaded_model_and_rows_to_test_on(rows: Path, model: str, tmp_path: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    frame = pd.read_csv(rows)
    outcomes = []
    for number, (given, test) in enumerate(
        [(frame[:150], frame[150:]), ({"train": frame[:150], "test": frame[150:]}, None)]
    ):
        more = {"model": loaded, "tokenizer": tokenizer} if number else {"model": model}
        out = tmp_path / f"run-{number}"
        outcomes.append(droppeft.run(given, test=test, out=out, **more, **QUICK))
    first, second = outcomes
    assert first.result["test_rows"] == second.result["test_rows"] == 30
    assert adapter_of(first) == adapter_of(second)
    assert [path.parent.name for path in (tmp_path / "droppeft-models").glob("*/config.json")] == [
        Path(second.result["model"]).name
    ]


def test_a_data_set_for_each_client(rows: Path, model: str, tmp_path: Path) -> None:
    frame = pd.read_csv(rows)
    parts = {"zoo": frame[:90], "bar": frame[90:130], "inn": frame[130:]}
    quick = {key: value for key, value in QUICK.items() if "client" not in key}
    quick = {**quick, "partition": {"min_rows": 3}, "cohort_size": 3, "rounds": 1}
    of_names = droppeft.run(parts, model=model, out=tmp_path / "names", **quick)
    of_list = droppeft.run(list(parts.values()), model=model, out=tmp_path / "list", **quick)
    for each in (of_names, of_list):
        assert each.result["clients"] == 3
        assert each.result["config"]["partition"]["kind"] == "natural"
        examples = {row["client"]: row for row in rows_of(each.folder / "clients.jsonl")}
        assert sorted(examples) == [0, 1, 2]
    assert adapter_of(of_names) == adapter_of(of_list)
    own = {row["client"]: row["rows"] for row in of_names.result["personalised"]}
    assert own[0] > own[2] >= own[1]  # a tenth of each client's rows, in the order given


# What a result has


def test_a_result(result: droppeft.Result, tmp_path: Path) -> None:
    written = json.loads((result.folder / "result.json").read_text())
    assert result.metrics["accuracy"] == written["global_accuracy"]
    assert result.metrics["initial_loss"] == written["initial_loss"]
    assert list(result.history["round"]) == [1, 2]
    history = rows_of(result.folder / "rounds.jsonl")
    assert list(result.history["global_loss"]) == [row["global_loss"] for row in history]
    assert list(result.clients["client"]) == [0, 1, 2]
    assert result.conclusion.splitlines() == written["conclusion"]
    assert repr(result).startswith("<droppeft.Result fedlora, accuracy .")
    html = result._repr_html_()
    assert html.count("<div") == html.count("</div>")
    assert "rows.csv · 2 rounds" in html
    axes = result.plot().axes
    assert [len(axis.lines[0].get_xdata()) for axis in axes] == [2, 2]
    assert (result.export(tmp_path / "mine") / "adapter_config.json").is_file()
    assert (result.client(1).export(tmp_path / "own", merge=True) / "config.json").is_file()


def test_predictions(result: droppeft.Result, rows: Path) -> None:
    texts = pd.read_csv(rows)["text"][:20]
    names = result.predict(texts)
    table = result.predict(list(texts), probabilities=True)
    assert list(table.columns) == ["food", "music", "space"]
    assert names == list(table.idxmax(axis=1))
    assert result.predict(texts[0]) == result.client(2).predict(texts[0]) == names[0]
    assert result.predict([]) == []
    with refused("text 2 is empty; remove it"):
        result.predict(["bread", " "])
    with refused(r"not a table; give data\['text'\]"):
        result.predict(pd.DataFrame({"text": texts}))
    with refused("text 1 is 3; give a text"):
        result.predict([3])
    with refused("there is no client 3; clients are 0 to 2"):
        result.client(3)
    with refused("does not generate text"):
        result.generate("a prompt")


def test_answers(tmp_path: Path) -> None:
    words = [*chat_settings(tmp_path), "rounds=1", "evaluation.generated=0"]
    words += ["evaluation.personalised=false"]
    start_run(load_config(None, words), tmp_path / "run", Recorder())
    result = droppeft.load(tmp_path / "run")
    one = result.generate("what is it", max_new_tokens=5)
    asked = [{"role": "user", "content": "what is it"}]
    assert result.generate(asked, max_new_tokens=5) == one
    assert result.generate(["what is it", asked], max_new_tokens=5, batch_size=1) == [one, one]
    with refused("does not end with a message to answer"):
        result.generate([{"role": "assistant", "content": "no"}])
    with refused("which writes texts"):
        result.predict("bread")


# Stops


def test_a_callback_s_error_ends_the_run_which_is_saved(
    result: droppeft.Result, rows: Path, model: str, tmp_path: Path
) -> None:
    told: list[int] = []

    class Fails:
        def round_done(self, row: Any) -> None:
            told.append(row.round)
            raise RuntimeError("my mistake")

    with pytest.raises(RuntimeError, match="my mistake") as raised:
        droppeft.run(rows, model=model, out=tmp_path / "run", callbacks=[Fails()], **QUICK)
    assert "droppeft.resume(" in raised.value.__notes__[0]
    with refused(r"the run is not finished; continue it with droppeft.resume\("):
        droppeft.load(tmp_path / "run")

    class Counts:
        def round_done(self, row: Any) -> None:
            told.append(row.round)

    again = droppeft.resume(tmp_path / "run", callbacks=[Counts()], progress=False)
    assert told == [1, 2]
    assert adapter_of(again) == adapter_of(result)


def test_ctrl_c_is_a_keyboard_interrupt_that_says_how_to_continue(
    rows: Path, model: str, tmp_path: Path
) -> None:
    class Stops:
        def round_done(self, row: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"after round 1, which is saved; .*\.resume\("):
        droppeft.run(rows, model=model, out=tmp_path / "run", callbacks=[Stops()], **QUICK)


def test_progress_is_printed_where_there_is_no_terminal(
    rows: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    droppeft.run(
        rows, model=model, out=tmp_path / "run", **{**QUICK, "rounds": 1, "progress": True}
    )
    printed = capsys.readouterr().out
    assert "round 1" in printed
    assert "Conclusion" in printed
    assert "droppeft report" not in printed


# Mistakes are refused before anything is written


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rouns": 3}, "unknown key rouns; did you mean rounds?"),
        ({"training": {"leraning_rate": 1}}, r"unknown key training.leraning_rate; did you mean"),
        ({"rounds": 0}, "rounds: .*greater than or equal to 1"),
        ({"method": "fedlor"}, "did you mean fedlora?"),
        ({"data": []}, "data is empty; give a path, .* a list of rows"),
        ({"data": 3}, "data is of type int; give a path"),
        ({"data": [1, 2]}, "data of client 0 is of type int"),
        ({"data": pd.Series(["x"])}, "a Series has no labels; give a DataFrame"),
        ({"data": [("hello", "x")] * 20}, "give rows as dicts: {'text': …, 'label': …}"),
        ({"training__lr": 3}, r"training__lr is no setting; write training={'learning_rate': …}"),
        ({"data": [{"text": 1}, {"text": "b"}]}, "cannot be made a table: .* one type"),
        ({"data": pd.DataFrame({"text": []})}, "data has no rows"),
        ({"model": 3}, "model is of type int, which is no model of transformers"),
        ({"tokenizer": 3}, "tokenizer goes with a loaded model"),
        ({"callbacks": [3]}, "callback int has none of the methods preparing"),
        ({"test": "nowhere.csv"}, "test=nowhere.csv: no such file"),
        ({"data": "builtin", "test": "x"}, "test goes with rows in memory or a file"),
    ],
)
def test_mistakes(given: dict[str, Any], message: str, rows: Path, tmp_path: Path) -> None:
    with refused(message):
        droppeft.run(**{"data": rows, "out": tmp_path / "run", **given})
    assert list(tmp_path.iterdir()) == []


def test_errors_about_rows_in_memory_name_no_file(tmp_path: Path) -> None:
    rows = [{"words x": f"some words {n}", "n": str(n % 9), "sort": "ab"[n % 2]} for n in range(60)]
    with refused('^the data: no text and .* add source={"text": "words x", "label": "sort"} if'):
        droppeft.run(rows, out=tmp_path / "run")
    # What stands in the data is repeated as it is.
    labelled = [{"text": f"words {n}", "label": "ab"[n % 2]} for n in range(60)]
    other = [{"text": "more", "label": "mysource.text=a"}]
    with refused(r"^the data \(test\): label mysource.text=a in row 1 does not occur"):
        droppeft.run(labelled, test=other, out=tmp_path / "run")


def test_data_sets_that_do_not_fit_together(rows: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(rows)
    other = frame.rename(columns={"text": "body"})
    with refused("data of client 1 has other columns or class names"):
        droppeft.run([frame, other], out=tmp_path / "run")
    with refused("data of client 1 has 2 rows; each client needs 10 or more, or 3 with test="):
        droppeft.run([frame, frame[:2]], out=tmp_path / "run")
    with refused("clients=5, but there are 2 data sets; leave it out"):
        droppeft.run([frame, frame], clients=5, out=tmp_path / "run")
    with refused("partition.kind and partition.key do not apply"):
        droppeft.run([frame, frame], partition={"kind": "iid"}, out=tmp_path / "run")


def test_a_second_run_in_another_thread_is_refused(rows: Path, model: str, tmp_path: Path) -> None:
    refusals: list[str] = []

    class StartsAnother:
        def round_done(self, row: Any) -> None:
            def work() -> None:
                with refused("another thread of this process is using droppeft") as found:
                    droppeft.run(rows, model=model, out=tmp_path / "other", **QUICK)
                refusals.append(str(found.value))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    one_round = {**QUICK, "rounds": 1}
    droppeft.run(rows, model=model, out=tmp_path / "run", callbacks=[StartsAnother()], **one_round)
    assert len(refusals) == 1
    assert not (tmp_path / "other").exists()


def test_a_loaded_model_with_another_configuration_is_another_model(
    model: str, tmp_path: Path
) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    first = save_model(loaded, tokenizer, tmp_path)
    assert save_model(loaded, tokenizer, tmp_path) == first
    loaded.config.layer_norm_eps = 0.5
    assert save_model(loaded, tokenizer, tmp_path) != first
    tokenizer.truncation_side = "left"
    assert len({first, save_model(loaded, tokenizer, tmp_path)}) == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_does_not_start_from_a_client_s_model_without_its_layers(
    result: droppeft.Result, rows: Path, tmp_path: Path
) -> None:
    with refused("start_from is the model of a client; export it"):
        droppeft.run(rows, out=tmp_path / "run", start_from=result.client(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("rounds", [4.0, "5"])
def test_a_wrong_number_of_rounds_leaves_a_finished_run_as_it_is(
    result: droppeft.Result, rounds: Any
) -> None:
    before = {path.name: path.read_bytes() for path in result.folder.iterdir() if path.is_file()}
    with refused("give a whole number"):
        droppeft.resume(result.folder, rounds=rounds, progress=False)
    assert before == {
        path.name: path.read_bytes() for path in result.folder.iterdir() if path.is_file()
    }


def test_a_method_of_droppeft_is_not_replaced() -> None:
    with refused("method fedlora: droppeft has one of this name"):
        droppeft.register(METHODS["fedlora"])
