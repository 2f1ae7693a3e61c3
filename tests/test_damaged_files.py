"""Whatever happens to a file that droppeft wrote, commands name it in one sentence or still work.

Each case damages one file in every way and calls a command that reads it. The command either gives
what it gives for whole files, or leaves with one sentence.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console

from droppeft.cli import main
from droppeft.client.client_state import client_folder
from droppeft.comparison.grid import cells, read_comparison
from droppeft.comparison.in_folder import compare_in_folder
from droppeft.config import load_config
from droppeft.report.show_comparison import Lines
from droppeft.server.run import start_run
from runs import Recorder, adapter_bytes, checkpoint_of, stop_after_a_round

Call = Callable[..., tuple[int, str]]
"""Runs a command; returns its exit code and what it wrote to stderr."""

Command = Callable[[Call, Path], object]
"""Runs a command on a folder; returns what it gives, or ``None`` if it was refused."""


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_a_key(path: Path) -> None:
    """Remove the first key of a JSON object or TOML file, or the first row of another."""
    text = path.read_bytes()
    if path.suffix == ".json":
        values = json.loads(text)
        path.write_text(json.dumps(dict(list(values.items())[1:])) if values else "")
    else:
        path.write_bytes(text.partition(b"\n")[2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut off by a byte": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "garbage": lambda path: path.write_bytes(b"\x00\xff\xfe garbage \n" * 20),
    "list": lambda path: path.write_text("[]\n"),
    "object": lambda path: path.write_text("{}\n"),
    "without its first part": without_a_key,
    "folder": as_folder,
}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    # main() installs a signal handler, which would outlive the test.
    monkeypatch.setattr("signal.signal", lambda *handler: None)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["droppeft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code
        return code if isinstance(code, int) else 0, capsys.readouterr().err

    return run


def checked(call: Call, *arguments: object) -> bool:
    """Run a command; return whether it worked, and check that it else leaves with a sentence."""
    code, said = call(*arguments)
    if code == 0:
        return True
    [sentence] = [line for line in said.splitlines() if line.startswith("droppeft: ")]
    assert code in (1, 2), said
    assert said.rstrip().endswith(sentence), said
    return False


def resume(call: Call, run: Path) -> object:
    return adapter_bytes(run) if checked(call, "resume", run, "--quiet") else None


def extend(call: Call, run: Path) -> object:
    return adapter_bytes(run) if checked(call, "resume", run, "rounds=4", "--quiet") else None


def export(call: Call, run: Path, *options: object) -> object:
    out = run.parent / "exported"
    if not checked(call, "export", run, *options, "--out", out):
        return None
    return (out / "adapter_model.safetensors").read_bytes()


def export_client(call: Call, run: Path) -> object:
    return export(call, run, "--client", participant(run))


def predict(call: Call, run: Path) -> object:
    file, out = run.parent / "new.csv", run.parent / "predicted.csv"
    file.write_text("text\nbread and salt\na star\n")
    return out.read_bytes() if checked(call, "predict", run, file, "--out", out) else None


def report(call: Call, folder: Path) -> object:
    return "a page" if checked(call, "report", folder) else None


def start_from(call: Call, run: Path) -> object:
    return _started(call, run, run)


def start_from_adapter(call: Call, run: Path) -> object:
    return _started(call, run, run / "adapter")


def _started(call: Call, run: Path, start: Path) -> object:
    words = [*(run.parent / "words.txt").read_text().splitlines(), f"start_from={start}"]
    words += ["rounds=1", "evaluation.personalised=false"]
    out = run.parent / "started"
    return adapter_bytes(out) if checked(call, "run", *words, "--quiet", "--out", out) else None


def compare(call: Call, folder: Path) -> object:
    done = checked(call, "compare", folder.parent / "comparison.toml", "--out", folder)
    return "tables" if done else None


def state_file(run: Path) -> Path:
    """The file of tensors that the participant saved."""
    folder = client_folder(checkpoint_of(run).facts["run"], participant(run))
    return max(folder.glob("round-*.safetensors"))


def restore(file: Path, content: bytes) -> None:
    if file.is_dir():
        file.rmdir()
    file.write_bytes(content)


def participant(run: Path) -> int:
    """The first client that has saved tensors."""
    memory = checkpoint_of(run).state.memory
    return min(memory.participations)


@pytest.fixture(scope="module")
def whole(
    tiny_overrides: list[str], whole_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Returns a folder with what is not damaged, made at the first call."""
    words = "\n".join(tiny_overrides)

    def finished(base: Path) -> None:
        shutil.copytree(whole_run, base / "finished")

    def stopped(base: Path) -> None:
        stop_after_a_round(tiny_overrides, base / "stopped")

    def personal(base: Path) -> None:
        settings = [*tiny_overrides, "sharing.fraction=0.5", "rounds=2"]
        start_run(load_config(None, settings), base / "personal", Recorder())

    def comparison(base: Path) -> None:
        common = [word for word in tiny_overrides if not word.startswith(("dropout.", "method="))]
        one = {"settings": [*common, "rounds=1"], "seeds": [0]}
        text = tomli_w.dumps({**one, "variants": {"a": ["method=fedlora"]}})
        (base / "comparison.toml").write_text(text)
        comparison = read_comparison(base / "comparison.toml")
        study, lines = comparison.study(text), Lines(Console())
        compare_in_folder(study, cells(comparison), None, base / "comparison", lines)

    @cache
    def make(kind: str) -> Path:
        base = tmp_path_factory.mktemp(kind)
        (base / "words.txt").write_text(words)
        {one.__name__: one for one in (finished, stopped, personal, comparison)}[kind](base)
        return base

    return make


LEDGERS, CHECKPOINTS = ("rounds.jsonl", "clients.jsonl"), "checkpoints/round-0000{}.safetensors"

READERS: tuple[tuple[str, tuple[str, ...], tuple[Command, ...]], ...] = (
    ("stopped", ("config.toml", *LEDGERS), (resume,)),
    ("stopped", tuple(map(CHECKPOINTS.format, (0, 1))), (resume,)),
    ("finished", ("result.json",), (resume, export, predict, report)),
    ("finished", ("config.toml", CHECKPOINTS.format(3)), (extend, export, predict, start_from)),
    ("finished", LEDGERS, (extend,)),
    ("finished", ("rounds.jsonl",), (export,)),
    ("finished", LEDGERS, (report,)),
    (
        "finished",
        tuple(f"adapter/adapter_{name}" for name in ("config.json", "model.safetensors")),
        (start_from_adapter,),
    ),
    ("personal", ("state",), (export_client,)),
    (
        "comparison",
        ("study.json", "runs.parquet", "rounds.parquet", "clients.parquet"),
        (report, compare),
    ),
)
"""Kind of folder, files, and commands that read them."""

CASES = {
    f"{kind}-{name}-{command.__name__}": (kind, name, command)
    for kind, names, commands in READERS
    for name in names
    for command in commands
}


@pytest.mark.sample(
    "stopped-clients.jsonl-resume", "stopped-config.toml-resume", "finished-result.json-export"
)
@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_named_or_does_no_harm(
    case: str,
    whole: Callable[[str], Path],
    call: Call,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind, name, command = CASES[case]
    work = tmp_path / "work"

    def copy() -> Path:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole(kind), work)
        return work / kind

    expected = command(call, copy())
    assert expected is not None
    for damage, apply in DAMAGES.items():
        caplog.clear()
        run = copy()
        file = state_file(run) if name == "state" else run / name
        before = file.read_bytes()
        try:
            apply(file)
            found = command(call, run)
        finally:
            if name == "state":
                restore(file, before)
        noticed = "is damaged" in caplog.text  # the checkpoint before is used, and it is said
        assert found in (None, expected) or noticed, damage
