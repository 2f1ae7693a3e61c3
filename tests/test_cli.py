"""The command line: every mistake is reported in one sentence; output of successful commands."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from droppeft import __version__
from droppeft.cli import app, main
from droppeft.config import known_keys
from droppeft.report.screen import quality_line
from runs import rows_of


@dataclass(frozen=True)
class Output:
    """Exit code and the two streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Output]


@pytest.fixture
def droppeft(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    # main() installs a signal handler, which would outlive the test.
    monkeypatch.setattr("signal.signal", lambda *handler: None)

    def call(*arguments: object) -> Output:
        monkeypatch.setattr("sys.argv", ["droppeft", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code
        captured = capfd.readouterr()
        return Output(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call


def assert_refused(output: Output, *parts: str) -> None:
    """One sentence on stderr, exit code 2."""
    assert output.code == 2, output
    assert output.err.startswith("droppeft: "), output.err
    assert output.err.count("\n") == 1, output.err
    for part in parts:
        assert part in output.err
    assert "Traceback" not in output.out + output.err


# Mistakes are refused before anything is written


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rouns=3"], ["unknown key rouns", "did you mean rounds?"]),
        (["dropout.meen=0.1"], ["unknown key dropout.meen", "did you mean dropout.mean?"]),
        (["rounds=many"], ["rounds", "'many'"]),
        (["rounds=2.5"], ["rounds", "2.5"]),
        (["seed=true"], ["seed"]),
        (["rounds=0"], ["rounds"]),
        (["source.text=body"], ["has no column body", "columns: text, label"]),
        (["data=nowhere.csv"], ["data=", "no such file or folder"]),
        (["data=broken.parquet"], ["broken.parquet", "cannot be read as parquet"]),
        (
            ["model=nobody/nothing"],
            ["model=nobody/nothing", "this hub id (check the id; HF_HUB_OFFLINE"],
        ),
        (["model=config:tiny"], ["unknown architecture; known are bert-large"]),
        (["transport=post"], ["transport=post: unknown transport; known are in_process"]),
        (["dropout.rates=[0,2,0,0]"], ["dropout.rates", "every rate must lie between 0 and 1"]),
        (["dropout.every=0"], ["dropout.every: must be a number of steps, 1 or more, or round"]),
        (["data=$NOWHERE/x"], ["data=", "the environment has no variable NOWHERE"]),
        (["sharing.fraction=0.05"], ["of 4 layers is none; set it to 0.25 for one layer, or to 0"]),
        (["dropout.rates=[0.5]"], ["1 drop rates were given for 4 layers"]),
        (["dropout.mean=0.9"], ["largest possible mean is 0.5"]),
        (["dropout.mean=0.1", "dropout.count=1"], ["give only one of dropout.mean"]),
        (["cohort_size=9"], ["cohort_size", "clients"]),
        (
            ["quorum=3"],
            ["quorum=3 is larger than cohort_size=2; lower quorum or raise cohort_size"],
        ),
        (["method=fedlora"], ["dropout.mean has no effect with method=fedlora; leave it out"]),
        (["one.toml", "two.toml"], ["only one configuration file", "one.toml and two.toml"]),
        (["one.toml"], ["one.toml: no such configuration file"]),
        (["broken.toml"], ["broken.toml: not valid TOML"]),
        (
            ["rounds"],
            ["'rounds' is neither a .toml file nor key=value; did you mean rounds=VALUE?"],
        ),
        (["rounds", "2"], ["got rounds and 2; did you mean rounds=2?"]),
        (["one.toml", "fedlora"], ["one.toml and fedlora; did you mean method=fedlora?"]),
        (["one.toml", "rounds", "2"], ["did you mean rounds=2?"]),
        (["fedlora"], ["did you mean method=fedlora?"]),
        (["wrong"], ["'wrong' is neither a .toml file nor key=value\n"]),
        (["method=fedloar"], ["unknown method; did you mean fedlora? Known are droppeft, "]),
        (["method=fedavg"], ["unknown method; did you mean method=fedlora? Known are droppeft, "]),
        (["fedprox"], ["did you mean method=fedlora training.proximal=0.01?"]),
        (["lr", "0.1"], ["got lr and 0.1; did you mean training.learning_rate?"]),
        (["adapter.targets=nothing"], ["adapter.targets: no layer has a linear module 'nothing'"]),
        (["clients=100"], ["too few for clients=100"]),
    ],
)
def test_a_mistake_is_one_sentence(
    droppeft: Command,
    tiny_overrides: list[str],
    tmp_path: Path,
    arguments: list[str],
    parts: list[str],
) -> None:
    (tmp_path / "broken.toml").write_text("rounds = = 3\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    base = tiny_overrides[:-1] if "dropout." in arguments[0] else tiny_overrides
    for out in ([], ["--out", "run"]):
        assert_refused(droppeft("run", *base, *arguments, *out), *parts)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"broken.toml", "broken.parquet"}


@pytest.mark.parametrize("command", ["run", "compare", "profile", "estimate"])
def test_a_setting_written_as_an_option(droppeft: Command, command: str) -> None:
    done = droppeft(command, "--training.batch-size", "2")
    assert done.code == 2
    assert "training.batch_size is a setting: write training.batch_size=VALUE" in done.err
    assert "is a setting" not in droppeft(command, "--nothing", "2").err
    assert (
        "No such option: --lr. Did you mean training.learning_rate?"
        in droppeft(command, "--lr", "2").err
    )


def test_a_mistake_in_a_file_names_the_file(droppeft: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[dropout]\nmeen = 0.5\n")
    assert_refused(droppeft("run", "mine.toml"), "unknown key dropout.meen in mine.toml")


def test_a_folder_that_exists(droppeft: Command, tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    again = droppeft("run", *tiny_overrides, "--out", "run")
    assert_refused(again, "run exists already; choose another folder\n")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]
    (tmp_path / "run" / "config.toml").write_text("")
    again = droppeft("run", *tiny_overrides, "--out", "run")
    assert_refused(again, "folder, or go on with its run: droppeft resume run\n")
    assert_refused(droppeft("report", "run"), "not finished; go on with: droppeft resume run\n")


def test_a_folder_that_cannot_be_made(
    droppeft: Command, tiny_overrides: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in ("file", "file/run", "file/deep/run"):
        assert_refused(droppeft("run", *tiny_overrides, "--out", out), f"{out}")
    assert (tmp_path / "file").read_text() == "in the way"


def test_resuming_a_run_that_does_not_exist(droppeft: Command) -> None:
    assert_refused(droppeft("resume", "nowhere"), "nowhere: holds no run to resume")
    assert_refused(droppeft("resume", "nowhere", "seed=3"), "only rounds can", "start_from=RUN")
    assert_refused(droppeft("resume", "nowhere", "rounds=few"), "write a whole number, 1 or more")
    assert_refused(droppeft("resume", "nowhere", "round=3"), "did you mean rounds?")


def test_exporting_a_run_that_does_not_exist(droppeft: Command, whole_run: Path) -> None:
    assert_refused(droppeft("export", "nowhere"), "nowhere: holds no run")
    output = droppeft("export", whole_run, "--round", "7", "--out", "adapter")
    assert_refused(output, "holds no round 7; the saved rounds are: 3, 2")


# What is printed


def test_the_version(droppeft: Command) -> None:
    output = droppeft("--version")
    assert (output.code, output.out) == (0, f"droppeft {__version__}\n")


def test_settings_are_listed_with_their_defaults(droppeft: Command) -> None:
    every = droppeft("settings").out
    assert [line for line in every.splitlines() if line.startswith("rounds=")] == ["rounds=10"]
    assert all(f"\n{key}=" in f"\n{every}" for key, _ in known_keys())
    found = droppeft("settings", "LoRA").out
    assert "adapter.rank=8\n" in found
    assert "16 with method=adaptive" in found
    assert "rounds=" not in found
    assert droppeft("settings", "lr").out.startswith("training.learning_rate=")
    assert_refused(droppeft("settings", "xyzzy"), "no setting has 'xyzzy'")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("run roun", ["rounds=", "rounds=VALUE"]),  # after a single one bash would put a space
        (
            "run rounds = 3 training.local",
            ["training.local_steps=", "training.local_epochs="],
        ),
        ("run data = tr", []),  # bash completes the names of files
    ],
)
def test_the_shell_completes_settings(words: str, found: list[str]) -> None:
    environment = {
        "_DROPPEFT_COMPLETE": "complete_bash",
        "COMP_WORDS": f"droppeft {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    done = CliRunner().invoke(app, prog_name="droppeft", env=environment)
    assert done.stdout.split() == found


def test_help_lists_the_commands(droppeft: Command) -> None:
    output = droppeft("--help")
    assert output.code == 0
    assert "run" in output.out
    assert "resume" in output.out
    assert "--out" in droppeft("run", "--help").out


def test_a_run_on_the_screen(droppeft: Command, tiny_overrides: list[str], tmp_path: Path) -> None:
    output = droppeft("run", *tiny_overrides)
    assert (output.code, output.err) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-droppeft")
    assert output.out.startswith("loading PyTorch and transformers …\n")
    assert f"\nresults  runs/{folder.name}" in output.out
    assert "\ntime     less than a minute" in output.out
    assert output.out.count("\nround ") == 3
    assert (folder / "report.html").is_file()
    assert f" Page runs/{folder.name}/report.html Next " in " ".join(output.out.split())
    result = json.loads((folder / "result.json").read_text())
    assert " ".join(result["conclusion"]) in " ".join(output.out.split())
    assert "\x1b" not in output.out


def test_a_quiet_run_prints_one_line(
    droppeft: Command, tiny_overrides: list[str], tmp_path: Path
) -> None:
    output = droppeft("run", *tiny_overrides, "--out", "run", "--quiet")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert output == Output(0, f"{quality_line(result)}\n", "")


def test_a_run_with_json_output(
    droppeft: Command, tiny_overrides: list[str], tmp_path: Path
) -> None:
    output = droppeft("run", *tiny_overrides, "--out", "run", "--json")
    assert (output.code, output.err) == (0, "")
    *rounds, last = (json.loads(line) for line in output.out.splitlines())
    saved = rows_of(tmp_path / "run" / "rounds.jsonl")
    assert rounds == [{"event": "round", **row} for row in saved]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert last == {"event": "result", **result}


def test_resuming_a_finished_run_reports_it(
    droppeft: Command, whole_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    result = json.loads((whole_run / "result.json").read_text())
    output = droppeft("resume", "run", "--quiet")
    assert output == Output(0, f"{quality_line(result)}\n", "")
    shown = droppeft("resume", "run")
    assert "Conclusion" in shown.out
    assert shown.err == "droppeft: run is finished already; its result:\n"


@pytest.mark.parametrize("form", [[], ["--merge"]])
def test_exporting_prints_the_folder_and_how_to_load_it(
    droppeft: Command, whole_run: Path, tmp_path: Path, form: list[str]
) -> None:
    output = droppeft("export", whole_run, "--out", "it", *form)
    result = json.loads((whole_run / "result.json").read_text())
    first, empty, *lines = output.out.splitlines()
    accuracy = f"accuracy {result['global_accuracy']:.4f} on 60 test texts"
    assert first == f"round 3, {accuracy}: {tmp_path / 'it'}"
    assert (output.code, output.err, empty) == (0, "", "")
    loaded: dict[str, Any] = {}
    exec("\n".join(lines), loaded)
    assert loaded["classify"].model.config.id2label == {0: "food", 1: "music", 2: "space"}
    [own] = [one for one in result["personalised"] if one["client"] == 2]
    output = droppeft("export", whole_run, "--client", "2", "--out", "own", *form)
    accuracy = f"accuracy {own['accuracy']:.4f} on {own['rows']} test texts"
    assert output.out.splitlines()[0] == f"round 3, {accuracy}: {tmp_path / 'own'}"
    assert loaded["classify"]("bread")[0]["label"] in ("food", "music", "space")


def test_ctrl_c_while_exporting(
    droppeft: Command, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*values: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("droppeft.runs.model_files.export_adapter", stop)
    output = droppeft("export", whole_run, "--out", "it")
    assert (output.code, output.err) == (130, "droppeft: stopped; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_overrides(droppeft: Command, tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("rounds = 9\nseed = 5\n")
    arguments = [setting for setting in tiny_overrides if not setting.startswith("rounds=")]
    output = droppeft("run", "mine.toml", *arguments, "rounds=1", "--out", "run", "--quiet")
    assert output.code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["rounds"], result["seed"]) == (1, 5)


def test_ctrl_c_before_the_first_round(
    droppeft: Command, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*values: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("droppeft.tasks.classification.load_backbone", stop)
    output = droppeft("run", *tiny_overrides, "--out", "run")
    assert output.code == 130
    assert output.err == "droppeft: stopped while preparing; nothing was written\n"
    assert not (tmp_path / "run").exists()


WITHOUT_TORCH = (
    ("run rounds 3", "did you mean rounds=3?"),
    ("run method=fedavg", "did you mean method=fedlora?"),
    ("run rows.csv", "did you mean data=rows.csv?"),
    ("run dropout.mean=.5", "has no effect with method=adaptive"),
    ("run adapter.type=ia3 adapter.rank=8", "type ia3 has no such setting"),
    ("run data=nothing.csv", "data=nothing.csv: no such file"),
    ("resume runs/nothing", "holds no run to resume"),
    ("predict RUN FILE --out rows.csv", "RUN: holds no run"),
    ("predict nothing rows.csv", "nothing: holds no run"),
    ("export nothing", "nothing: holds no run"),
    ("chat nothing", "nothing: holds no run"),
    ("generate nothing rows.csv", "nothing: holds no run"),
    ("data nothing.csv", "data=nothing.csv: no such file"),
    ("data columns.csv", "no label column found"),
    ("compare fedavg", "did you mean method=fedlora?"),
)
"""Mistakes, and a part of their sentences."""


def test_mistakes_are_answered_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    (tmp_path / "columns.csv").write_text("text,a,b\nx,y,z\n")
    code = (
        "import json, sys\n"
        "from droppeft.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['droppeft', *words.split()]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as left:\n"
        "        print(left.code, *{'torch', 'transformers'} & {*sys.modules}, flush=True)\n"
    )
    words = json.dumps([words for words, _ in WITHOUT_TORCH])
    done = subprocess.run(
        [sys.executable, "-c", code, words], capture_output=True, text=True, cwd=tmp_path
    )
    sentences = done.stderr.splitlines()
    assert len(sentences) == len(WITHOUT_TORCH), done.stderr
    for (_, part), sentence in zip(WITHOUT_TORCH, sentences, strict=True):
        assert part in sentence
    assert done.stdout.splitlines() == ["2"] * len(WITHOUT_TORCH)
