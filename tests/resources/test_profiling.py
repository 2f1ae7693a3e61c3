"""Trials in fresh processes: what they find, and how they fail."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from droppeft import cli
from droppeft.config import Config, load_config
from droppeft.costs.step_counts import step_stored_bytes
from droppeft.errors import DroppeftError
from droppeft.models.loading import load_backbone
from droppeft.report import show_profile as report
from droppeft.resources import profiling
from droppeft.resources.estimate import counts_of, option
from droppeft.resources.model_shape import CLASSES
from droppeft.resources.profile_run import ProfileRun, random_table
from droppeft.resources.profiling import Measured, at_rate, in_fresh_process, profile
from tiny import save_tiny_model

SETTINGS = ("training.batch_size=4", "training.max_length=16", "accelerator=cpu", "threads=1")
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", LAYERS)


def config_of(folder: Path, *words: str) -> Config:
    ends = ("dropout.protect_first=0", "dropout.protect_last=0")
    return load_config(None, [f"model={folder}", *SETTINGS, *ends, *words])


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["droppeft", "profile", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_profile_from_the_command_line_to_its_files(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--rates", "0,0.5", "--repeats", "1", "--steps", "2", "--json"]
    out = tmp_path / "new" / "folder"
    words = [*options, "--out", str(out), f"model={folder}", *SETTINGS, "frozen.layers=2"]
    assert run(monkeypatch, *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "profile.json").read_text()) == result
    assert (out / "profile.png").stat().st_size > 5000
    assert "<svg" in (out / "profile.svg").read_text()
    assert result["command"].startswith("droppeft profile --rates 0,0.5")
    assert result["config"]["training"]["batch_size"] == 4
    assert {"torch", "droppeft"} <= result["versions"].keys()
    full, half = result["rates"]
    # Of four layers two are frozen, and their states on the disk from the warm-up on.
    assert (full["rate"], half["rate"], result["num_layers"]) == (0, 0.5, LAYERS)
    assert (full["executed"], half["executed"]) == (2, 1)
    for row, active in ((full, (False, False, True, True)), (half, (False, False, False, True))):
        config = config_of(folder, "frozen.layers=2")
        assert row["activation_bytes_peak"] == step_stored_bytes(counts_of(config), active)
        assert row["step_s"] > 0
        assert row["step_quartiles_s"] == [row["step_s"], row["step_s"]]
        assert row["process_bytes"] < row["used_bytes"] < row["process_bytes"] + 100e6
        assert row["resident_bytes"] > row["process_bytes"]
        assert row["step_j"] is None
        assert [trial["executed"] for trial in row["trials"]] == [row["executed"]]


def test_random_rows_are_as_long_as_said_but_for_padding(folder: Path) -> None:
    """A batch without padding has no mask, and torch other kernels for it."""
    backbone = load_backbone(str(folder), CLASSES, 0)
    table = random_table(backbone, config_of(folder))
    assert table.lengths.tolist() == [16, 15, 16, 16]
    assert table.columns.keys() == {"input_ids", "token_type_ids"}
    again = random_table(backbone, config_of(folder)).columns["input_ids"]
    assert (table.columns["input_ids"] == again).all()
    assert 0 <= again.min() < again.max() < 30522
    single = random_table(backbone, config_of(folder, "training.batch_size=1", "seed=1"))
    assert single.lengths.tolist() == [16]
    assert (single.columns["input_ids"] != again[:16]).any()


def test_memory_in_use_is_what_is_planned() -> None:
    """A small batch on the built-in model: within 10 %; benchmarks/cost_model has more."""
    words = ("training.batch_size=8", "training.max_length=64", "dropout.mean=0.33333333333333331")
    config = load_config(None, ["accelerator=cpu", "threads=1", *words])
    trial = in_fresh_process(config, 1, frugal=True)
    assert trial.peak_bytes - trial.process_bytes == pytest.approx(
        option(config, None).memory.model, rel=0.1
    )


def trial(
    step_s: float, stored: int = 5, peak: int = 100, step_j: float | None = None
) -> ProfileRun:
    return ProfileRun(step_s, 3.0, stored, 40, peak, False, step_j)


def test_what_is_said_of_some_trials() -> None:
    times = (5.0, 1.0, 2.0, 4.0, 3.0)
    trials = tuple(trial(time, peak=90 + int(time), step_j=10 * time) for time in times)
    found = Measured(0.5, trials, trial(9.0, stored=7, peak=60))
    assert found.step_s == 3.0
    assert found.step_quartiles_s == (2.0, 4.0)
    assert found.step_j == 30.0
    assert (found.used_bytes, found.resident_bytes) == (60, 95)
    assert found.activation_bytes_peak == 7
    assert found.executed == 3.0
    assert Measured(0.0, (trial(1.0),), trial(1.0)).step_j is None


def test_rates_take_turns_and_memory_comes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float | None, bool]] = []

    def made_up(config: Config, steps: int, *, frugal: bool) -> ProfileRun:
        asked.append((config.dropout.mean, frugal))
        return trial(float(len(asked)))

    monkeypatch.setattr(profiling, "in_fresh_process", made_up)
    done: list[None] = []
    found = profile(config_of(folder), [0.0, 0.5], 2, 1, lambda: done.append(None))
    assert asked == [(0, True), (0.5, True), (0, False), (0.5, False), (0, False), (0.5, False)]
    assert [one.frugal.step_s for one in found] == [1.0, 2.0]
    assert [[one.step_s for one in rate.trials] for rate in found] == [[3.0, 5.0], [4.0, 6.0]]
    assert len(done) == 6


def test_a_rate_replaces_whatever_said_how_many_layers_drop(folder: Path) -> None:
    for word in ("dropout.count=2", "dropout.rates=[0,0,0,1]", "dropout.mean=0.1"):
        config = at_rate(config_of(folder, word), 0.5)
        assert (config.dropout.mean, config.dropout.count, config.dropout.rates) == (
            0.5,
            None,
            None,
        )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rates", "0,much"], "--rates '0,much': write numbers as 0,0.25,0.5"),
        (["--rates", ""], "--rates '': write numbers as 0,0.25,0.5"),
        (["--rates", "0,1.5"], "a rate of 1.5 is impossible; it must lie between 0 and 1"),
        (["--rates", "0.9", "dropout.protect_first=2"], "a mean drop rate of 0.9 over 4 layers"),
        (["model=config:nothing"], "model=config:nothing: unknown architecture"),
        (["model=./nowhere"], "model=./nowhere: no such folder"),
        (["frozen.layers=4"], "frozen.layers=4 leaves none of the 4 layers to train"),
        (["training.max_length=600"], "texts of 600 tokens"),
        (["adapter.type=prefix_tuning", "frozen.layers=1"], "needs an adapter in the layers"),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(
    folder: Path,
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(profiling, "in_fresh_process", None)
    assert run(monkeypatch, f"model={folder}", *words) == cli.USER_ERROR
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1


def in_a_fork(monkeypatch: pytest.MonkeyPatch, do: Callable[..., object], folder: Path) -> None:
    """Let the trial's process, a copy of this one, do something else."""
    monkeypatch.setattr(profiling, "_start_method", lambda: "fork")
    monkeypatch.setattr(profiling, "run_steps", do)
    in_fresh_process(at_rate(config_of(folder), 0.25), 1, frugal=False)


def test_a_trial_that_fails_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Config, steps: int, *, frugal: bool) -> None:
        raise RuntimeError("out of memory: tried to allocate 3 GiB\nwith details")

    with pytest.raises(DroppeftError, match=r"^out of memory: tried to allocate 3 GiB$"):
        in_a_fork(monkeypatch, fail, folder)


def test_a_trial_that_is_killed_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(config: Config, steps: int, *, frugal: bool) -> None:
        os._exit(9)

    with pytest.raises(DroppeftError, match=r"measured rate 0.25 died \(exit code 9\), probably"):
        in_a_fork(monkeypatch, die, folder)


def test_nothing_is_written_where_nothing_can_be(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(DroppeftError, match=f"--out {taken}: cannot be written"):
        report.write({"rates": []}, taken)


def rows_of(*found: Measured) -> dict[str, object]:
    config = load_config(None, ["accelerator=cpu"])
    return report.content(config, found, steps=3)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = Measured(0.0, (trial(2.0),), trial(2.0)), Measured(0.5, (trial(1.0),), trial(1.0))
    console = Console(record=True, width=80)
    report.show(rows_of(slow, fast), console)
    text = console.export_text()
    assert "builtin · lora · batch 16 x 128 tokens · fp32 · measured on cpu" in text
    expected = ["0", "3.00/6", "2.000 s", "2.000–2.000", "5 B", "100 B", "100 B"]
    assert fields(text, "0") == expected
    assert "of which 40 B are libraries" in text
    assert "energy: not reported by this hardware" in " ".join(text.split())
    report.show(rows_of(slow, replace(fast, trials=(trial(1.0, step_j=7.5),))), console)
    text = console.export_text()
    assert fields(text, "0")[-1] == "–"
    assert fields(text, "0.5")[-1] == "7.50 J"
    assert "not reported" not in text


def fields(text: str, first: str) -> Sequence[str]:
    [line] = [line.split() for line in text.splitlines() if line.split()[:1] == [first]]
    joined: list[str] = []
    for word in line:
        if word in ("s", "B", "J"):
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined


# Resident memory


def test_the_peak_is_remembered_until_it_is_forgotten() -> None:
    """In a process of its own: other tests' garbage may go while a peak is measured here."""
    program = """
from droppeft.resources.process_memory import forget_peak, peak_resident_bytes, resident_bytes
if not forget_peak():
    assert peak_resident_bytes() >= resident_bytes()
    raise SystemExit
before = peak_resident_bytes()
block = bytearray(64 << 20)
block[::4096] = b"x" * len(block[::4096])
del block
assert peak_resident_bytes() - before > 50e6
assert forget_peak()
assert peak_resident_bytes() - before < 40e6
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_freed_memory_goes_back() -> None:
    """Holes of a megabyte between blocks that stay: glibc's heap keeps them, by default."""
    program = """
import numpy, sys
from droppeft.resources.process_memory import give_memory_back, resident_bytes
if sys.argv[1] == "frugal":
    give_memory_back()
numpy.ones(30 << 20, numpy.uint8)  # freed: from now on glibc takes such blocks from its heap
before = resident_bytes()
kept = []
gone = []
for _ in range(100):
    gone.append(numpy.ones(1 << 20, numpy.uint8))
    kept.append(numpy.ones(1 << 17, numpy.uint8))
gone.clear()
print(resident_bytes() - before)
"""
    found = [
        int(
            subprocess.run(
                [sys.executable, "-c", program, word], capture_output=True, check=True
            ).stdout
        )
        for word in ("frugal", "usual")
    ]
    assert found[0] < 25e6
    assert found[0] <= found[1]
