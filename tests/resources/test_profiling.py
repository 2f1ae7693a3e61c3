"""Profile runs in fresh processes: what they measure, and how they fail."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from chats import save_chat_model
from droppeft import cli
from droppeft.command_line_exit import USER_ERROR
from droppeft.config import Config, load_config, resolve
from droppeft.errors import DroppeftError
from droppeft.models.loading import load_backbone
from droppeft.report import show_profile as report
from droppeft.resources import profiling
from droppeft.resources.estimate import counts_of, option
from droppeft.resources.model_shape import CLASSES
from droppeft.resources.profile_run import ProfileRun, random_table, run_steps
from droppeft.resources.profiling import RateProfile, at_rate, in_fresh_process, profile
from handmade import step_stored_bytes
from tiny import save_tiny_model

SETTINGS = (
    *("training.batch_size=4", "training.max_length=16", "training.precision=fp32"),
    *("accelerator=cpu", "threads=1"),
)
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", LAYERS)


def config_of(folder: Path, *overrides: str) -> Config:
    ends = ("dropout.protect_first=0", "dropout.protect_last=0")
    return load_config(None, [f"model={folder}", *SETTINGS, *ends, *overrides], "droppeft")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["droppeft", "profile", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.full
def test_profile_from_the_command_line_to_its_files(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--rates", "0,0.5", "--repeats", "1", "--steps", "2", "--json"]
    out = tmp_path / "new" / "folder"
    arguments = [*options, "--out", str(out), f"model={folder}", *SETTINGS, "frozen.layers=2"]
    assert run(monkeypatch, *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "profile.json").read_text()) == result
    assert (out / "profile.png").stat().st_size > 5000
    assert "<svg" in (out / "profile.svg").read_text()
    assert result["command"].startswith("droppeft profile --rates 0,0.5")
    assert result["config"]["training"]["batch_size"] == 4
    assert {"torch", "droppeft"} <= result["versions"].keys()
    full, half = result["rates"]
    # Two of four layers are frozen; the warm-up caches their hidden states.
    assert (full["rate"], half["rate"], result["num_layers"]) == (0, 0.5, LAYERS)
    assert (full["trained"], half["trained"]) == (2, 1)
    for row, active in ((full, (False, False, True, True)), (half, (False, False, False, True))):
        config = config_of(folder, "frozen.layers=2")
        assert row["activation_bytes_peak"] == step_stored_bytes(counts_of(config), active)
        assert row["step_s"] > 0
        assert row["step_quartiles_s"] == [row["step_s"], row["step_s"]]
        assert row["process_bytes"] < row["used_bytes"] < row["process_bytes"] + 100e6
        assert row["resident_bytes"] > row["process_bytes"]
        assert row["step_j"] is None
        assert [run["trained"] for run in row["timed_runs"]] == [row["trained"]]


def test_random_rows_have_the_configured_length_except_one_with_padding(folder: Path) -> None:
    """A batch without padding has no mask, for which torch uses other kernels."""
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


def test_a_step_of_a_language_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: as a client's, on random rows of which the last tokens are learnt."""
    monkeypatch.setenv("DROPPEFT_CACHE", "set by the profile run")
    model = save_chat_model(tmp_path / "model")
    settings = (*SETTINGS, "task=causal_lm", "dropout.mean=0.25", "training.precision=fp32")
    config = resolve(load_config(None, [f"model={model}", *settings], "droppeft"), cuda=False)
    measured = run_steps(config, 2, release_memory=False)
    assert (measured.trained, measured.step_s > 0) == (3, True)
    assert measured.activation_bytes_peak > 0


@pytest.mark.full
def test_memory_in_use_is_what_is_estimated() -> None:
    """A small batch on the built-in model: within 10 %; benchmarks/cost_model has more."""
    overrides = (
        "training.batch_size=8",
        "training.max_length=64",
        "dropout.mean=0.33333333333333331",
    )
    machine = ("accelerator=cpu", "threads=1", "training.precision=fp32")
    config = load_config(None, [*machine, *overrides], "droppeft")
    measured = in_fresh_process(config, 1, release_memory=True)
    assert measured.peak_bytes - measured.process_bytes == pytest.approx(
        option(config, None).memory.model, rel=0.1
    )


def profile_run(
    step_s: float, stored: int = 5, peak: int = 100, step_j: float | None = None
) -> ProfileRun:
    return ProfileRun(step_s, 3.0, stored, 40, peak, False, step_j)


def test_statistics_of_profile_runs() -> None:
    times = (5.0, 1.0, 2.0, 4.0, 3.0)
    runs = tuple(profile_run(time, peak=90 + int(time), step_j=10 * time) for time in times)
    found = RateProfile(0.5, runs, profile_run(9.0, stored=7, peak=60))
    assert found.step_s == 3.0
    assert found.step_quartiles_s == (2.0, 4.0)
    assert found.step_j == 30.0
    assert (found.used_bytes, found.resident_bytes) == (60, 95)
    assert found.activation_bytes_peak == 7
    assert found.trained == 3.0
    assert RateProfile(0.0, (profile_run(1.0),), profile_run(1.0)).step_j is None


def test_rates_alternate_and_memory_is_measured_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float | None, bool]] = []

    def made_up(config: Config, steps: int, *, release_memory: bool) -> ProfileRun:
        asked.append((config.dropout.mean, release_memory))
        return profile_run(float(len(asked)))

    monkeypatch.setattr(profiling, "in_fresh_process", made_up)
    done: list[None] = []
    found = profile(config_of(folder), [0.0, 0.5], 2, 1, lambda: done.append(None))
    assert asked == [(0, True), (0.5, True), (0, False), (0.5, False), (0, False), (0.5, False)]
    assert [each.memory_run.step_s for each in found] == [1.0, 2.0]
    assert [[run.step_s for run in rate.timed_runs] for rate in found] == [[3.0, 5.0], [4.0, 6.0]]
    assert len(done) == 6


def test_a_rate_replaces_other_settings_of_the_drop_rate(folder: Path) -> None:
    for override in ("dropout.count=2", "dropout.rates=[0,0,0,1]", "dropout.mean=0.1"):
        config = at_rate(config_of(folder, override), 0.5)
        assert (config.dropout.mean, config.dropout.count, config.dropout.rates) == (
            0.5,
            None,
            None,
        )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--rates", "0,much"], "--rates '0,much': write numbers as 0,0.25,0.5"),
        (["--rates", ""], "--rates '': write numbers as 0,0.25,0.5"),
        (["--rates", "0,1.5"], "a rate of 1.5 is impossible; it must lie between 0 and 1"),
        (["--rates", "0.9", "dropout.protect_first=2"], "a mean drop rate of 0.9 over 4 layers"),
        (["model=config:nothing"], "model=config:nothing: unknown architecture"),
        (["model=./nowhere"], "model=./nowhere: no such folder"),
        (["frozen.layers=4"], "frozen.layers=4 leaves none of the 4 layers to train"),
        (["training.max_length=600"], "texts of 600 tokens"),
        (["adapter.type=prefix_tuning", "frozen.layers=1"], "needs an adapter inside layers"),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(
    folder: Path,
    overrides: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(profiling, "in_fresh_process", None)
    assert run(monkeypatch, f"model={folder}", *overrides) == USER_ERROR
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1


def in_a_fork(monkeypatch: pytest.MonkeyPatch, do: Callable[..., object], folder: Path) -> None:
    """Call another function in the process of a profile run, forked from this one."""
    monkeypatch.setattr(profiling, "_start_method", lambda: "fork")
    monkeypatch.setattr(profiling, "run_steps", do)
    in_fresh_process(at_rate(config_of(folder), 0.25), 1, release_memory=False)


def test_a_profile_run_that_fails_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Config, steps: int, *, release_memory: bool) -> None:
        raise RuntimeError("out of memory: tried to allocate 3 GiB\nwith details")

    with pytest.raises(DroppeftError, match=r"^out of memory: tried to allocate 3 GiB$"):
        in_a_fork(monkeypatch, fail, folder)


def test_a_profile_run_that_is_killed_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(config: Config, steps: int, *, release_memory: bool) -> None:
        os._exit(9)

    with pytest.raises(DroppeftError, match=r"measured rate 0.25 died \(exit code 9\), probably"):
        in_a_fork(monkeypatch, die, folder)


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(DroppeftError, match=f"--out {taken}: cannot be written"):
        report.write({"rates": []}, taken)


def rows_of(*found: RateProfile) -> dict[str, object]:
    config = load_config(None, ["accelerator=cpu", "training.precision=fp32"], "droppeft")
    return report.content(config, found, steps=3)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = (
        RateProfile(0.0, (profile_run(2.0),), profile_run(2.0)),
        RateProfile(0.5, (profile_run(1.0),), profile_run(1.0)),
    )
    console = Console(record=True, width=80)
    report.show(rows_of(slow, fast), console)
    text = console.export_text()
    assert "builtin · lora · batch 16 x 128 tokens · fp32 · measured on cpu" in text
    expected = ["0", "3.00/6", "2.000 s", "2.000–2.000", "5 B", "100 B", "100 B"]
    assert fields(text, "0") == expected
    assert "of which 40 B are libraries" in text
    assert "energy: not reported by this hardware" in " ".join(text.split())
    report.show(rows_of(slow, replace(fast, timed_runs=(profile_run(1.0, step_j=7.5),))), console)
    text = console.export_text()
    assert fields(text, "0")[-1] == "–"
    assert fields(text, "0.5")[-1] == "7.50 J"
    assert "not reported" not in text


def fields(text: str, first: str) -> Sequence[str]:
    [line] = [line.split() for line in text.splitlines() if line.split()[:1] == [first]]
    joined: list[str] = []
    for text_part in line:
        if text_part in ("s", "B", "J"):
            joined[-1] += f" {text_part}"
        else:
            joined.append(text_part)
    return joined


# Resident memory


def test_the_peak_lasts_until_it_is_reset() -> None:
    """In a separate process: other tests' garbage may be freed while a peak is measured here."""
    program = """
from droppeft.resources.process_memory import reset_peak, peak_resident_bytes, resident_bytes
if not reset_peak():
    assert peak_resident_bytes() >= resident_bytes()
    raise SystemExit
before = peak_resident_bytes()
block = bytearray(64 << 20)
block[::4096] = b"x" * len(block[::4096])
del block
assert peak_resident_bytes() - before > 50e6
assert reset_peak()
assert peak_resident_bytes() - before < 40e6
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.full
def test_freed_memory_is_returned() -> None:
    """Freed blocks of a megabyte between blocks in use, which glibc's heap keeps by default."""
    program = """
import numpy, sys
from droppeft.resources.process_memory import return_freed_memory, resident_bytes
if sys.argv[1] == "return":
    return_freed_memory()
numpy.ones(30 << 20, numpy.uint8)  # after this is freed, glibc takes such blocks from its heap
before = resident_bytes()
in_use = []
freed = []
for _ in range(100):
    freed.append(numpy.ones(1 << 20, numpy.uint8))
    in_use.append(numpy.ones(1 << 17, numpy.uint8))
freed.clear()
print(resident_bytes() - before)
"""
    found = [
        int(
            subprocess.run(
                [sys.executable, "-c", program, mode], capture_output=True, check=True
            ).stdout
        )
        for mode in ("return", "default")
    ]
    assert found[0] < 25e6
    assert found[0] <= found[1]
