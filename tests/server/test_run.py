"""A whole run: it is reproducible, also after a crash at any moment."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from droppeft.client.run_inputs import Loaded, clients_of
from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Failure
from droppeft.runs.export import saved_model
from droppeft.runs.folder import LOCK, check_free, locked
from droppeft.server.resume import resume_run
from droppeft.server.run import Interrupted, start_run
from droppeft.training.loop import Evaluation, evaluate
from droppeft.transports.base import Arrival
from droppeft.transports.in_process import InProcess
from refusals import refused
from runs import Recorder, adapter_bytes, checkpoint_of, outcome, rows_of

MAIN = "from droppeft.cli import main; main()"
KILLED_IN_EXPORT = """
import os, signal
from droppeft.runs import model_files
write = model_files.export_adapter
def half(model, folder, card):
    write(model, folder, card)
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
model_files.export_adapter = half
"""


class Crash(Exception):
    """Stands for the end of the process."""


def test_a_finished_run_has_these_files_and_rows(whole_run: Path) -> None:
    rounds, clients = (rows_of(whole_run / name) for name in ("rounds.jsonl", "clients.jsonl"))
    assert [row["round"] for row in rounds] == [1, 2, 3]
    fields = (
        "global_accuracy global_loss train_loss host_wall_s upload_bytes download_bytes "
        "mean_active_layers activation_bytes_peak cohort"
    )
    for row in rounds:
        assert all(row[name] is not None for name in fields.split())
        assert row["accepted"] == len(row["cohort"]) == 2
        assert sum(row["layer_steps"]) == row["mean_active_layers"] * 2 * len(row["cohort"])
    asked = [(row["round"], client) for row in rounds for client in row["cohort"]]
    assert [(row["round"], row["client"]) for row in clients] == asked
    saved = sorted(path.name for path in (whole_run / "checkpoints").iterdir())
    best = min(rounds, key=lambda row: row["validation_loss"])["round"]
    assert saved == [f"round-{round:05d}.safetensors" for round in sorted({0, 2, 3, best})]
    assert list(whole_run.rglob("*.partial")) == []


def test_a_result_holds_all_that_a_reader_needs(whole_run: Path) -> None:
    result = json.loads((whole_run / "result.json").read_text())
    fields = (
        "method model data seed target time_to_target_measured_s schema_version versions machine "
        "global_accuracy global_loss train_loss host_wall_s upload_bytes download_bytes "
        "mean_active_layers activation_bytes_peak"
    )
    assert set(fields.split()) <= result.keys()
    rounds = rows_of(whole_run / "rounds.jsonl")
    for name in ("upload_bytes", "download_bytes"):
        assert result[name] == sum(row[name] for row in rounds)
    assert result["test_rows"] == 60
    assert result["machine"]["threads"] == 1
    assert result["mean_active_layers"] == 3.0


def test_another_seed_gives_another_run(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    start_run(load_config(None, [*tiny_overrides, "seed=1"]), tmp_path / "run", Recorder())
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(whole_run)


def test_the_configuration_in_the_folder_repeats_the_run(whole_run: Path, tmp_path: Path) -> None:
    start_run(load_config(whole_run / "config.toml"), tmp_path / "again", Recorder())
    assert outcome(tmp_path / "again") == outcome(whole_run)


def test_rounds_between_evaluations_have_no_accuracy(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    words = [*tiny_overrides, "evaluation.every=2"]
    start_run(load_config(None, words), tmp_path / "run", Recorder())
    measured = [row["global_accuracy"] for row in rows_of(tmp_path / "run" / "rounds.jsonl")]
    # The second because it is due, the third because it is the last.
    assert [value is None for value in measured] == [True, False, False]


def test_a_run_that_diverges_says_so_in_that_round_and_writes_valid_json(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter((1.1, 1.1, math.nan, math.inf, 1.1))

    def evaluated(*args: Any) -> Evaluation:
        found = evaluate(*args)
        return replace(found, metrics={**found.metrics, "loss": next(calls)})

    monkeypatch.setattr("droppeft.server.global_evaluation.evaluate", evaluated)
    out = tmp_path / "run"
    start_run(load_config(None, tiny_overrides), out, Recorder())
    lines = (out / "rounds.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["diverged"] for row in rows] == [False, True, True]
    assert [row["global_loss"] for row in rows] == [1.1, None, None]
    result = json.loads((out / "result.json").read_text(), parse_constant=pytest.fail)
    assert "not finite in round 2. Try a lower" in result["conclusion"][0]


def test_a_model_that_is_broken_before_training_is_refused(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(*args: Any) -> Evaluation:
        return replace(evaluate(*args), metrics={"accuracy": 0.5, "f1": 0.5, "loss": math.nan})

    monkeypatch.setattr("droppeft.server.global_evaluation.evaluate", evaluated)
    with refused("is not finite before training: its weights are damaged"):
        start_run(load_config(None, tiny_overrides), tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()


# Crashes


CRASHES: dict[str, tuple[str, int, bool]] = {
    # The process ends when this function is called for the n-th time, before (False) or after
    # (True) the call.
    "before the clients' rows": ("droppeft.server.run.append_rows", 1, False),
    "between the two ledgers": ("droppeft.server.run.append_rows", 3, True),
    "after the rows, before the checkpoint": ("droppeft.server.run.append_rows", 4, True),
    "after the first checkpoint": ("droppeft.runs.checkpoints.save", 2, True),
    "before the last checkpoint": ("droppeft.runs.checkpoints.save", 4, False),
    "before the adapter": ("droppeft.runs.model_files.export_adapter", 1, False),
    "within the adapter": ("droppeft.runs.model_files.export_adapter", 1, True),
    "between adapter and result": ("droppeft.server.final_evaluation.write_adapter", 1, True),
    "after the result": ("droppeft.server.run.write_atomically", 1, True),
}


def crash_at(
    patch: pytest.MonkeyPatch,
    name: str,
    number: int,
    after: bool,
    error: type[BaseException] = Crash,
) -> None:
    module, _, function = name.rpartition(".")
    original = getattr(sys.modules[module], function)
    calls = 0

    def crashing(*values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise error
        result = original(*values)
        if calls == number:
            raise error
        return result

    patch.setattr(name, crashing)


@pytest.mark.sample("between the two ledgers", "within the adapter")
@pytest.mark.parametrize("when", CRASHES)
def test_a_crash_leaves_a_run_that_ends_the_same(
    when: str, tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, *CRASHES[when])
        with pytest.raises(Crash):
            start_run(load_config(None, tiny_overrides), out, Recorder())
    resume_run(out, Recorder())
    assert outcome(out) == outcome(whole_run)


@pytest.mark.full
def test_two_crashes_in_a_row(tiny_overrides: list[str], whole_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go: Callable[[], Any]
    for go in (
        lambda: start_run(load_config(None, tiny_overrides), out, Recorder()),
        lambda: resume_run(out, Recorder()),
    ):
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, "droppeft.server.run.append_rows", 4, True)
            with pytest.raises(Crash):
                go()
    resume_run(out, Recorder())
    assert outcome(out) == outcome(whole_run)


def stop_after(rounds: int, tiny_overrides: list[str], out: Path) -> None:
    """Start a run and interrupt it after a number of rounds."""

    class Impatient(Recorder):
        def round_done(self, row: Any) -> None:
            if row.round == rounds:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        start_run(load_config(None, tiny_overrides), out, Impatient())
    assert (stopped.value.folder, stopped.value.round) == (out, rounds)


def test_a_round_with_an_incomplete_row_is_run_again(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop_after(2, tiny_overrides, out)
    for name in ("rounds.jsonl", "clients.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"round": 3, "coh')
    left_behind = [out / ".rounds.jsonl.a1", out / "checkpoints" / ".round-00003.safetensors.a1"]
    for path in left_behind:
        path.touch()
    listener = Recorder()
    resume_run(out, listener)
    assert not any(path.exists() for path in left_behind)
    assert outcome(out) == outcome(whole_run)
    assert [row.round for row in listener.earlier] == [1, 2]
    assert [row.round for row in listener.rows] == [3]


def test_a_damaged_checkpoint_costs_a_round(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop_after(2, tiny_overrides, out)
    newest = out / "checkpoints" / "round-00002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    listener = Recorder()
    resume_run(out, listener)
    assert [row.round for row in listener.earlier] == [1]
    assert outcome(out) == outcome(whole_run)


def test_a_finished_run_is_only_reported(whole_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    (out / LOCK).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    listener = Recorder()
    result = resume_run(out, listener)
    assert listener.results == [result] == [json.loads((out / "result.json").read_text())]
    assert (listener.steps, listener.rows) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_listener_hears_everything_and_a_second_process_is_refused(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"

    class Intruder(Recorder):
        def round_done(self, row: Any) -> None:
            with pytest.raises(DroppeftError, match="another process is working on this run"):
                resume_run(out, Recorder())
            super().round_done(row)

    listener = Intruder()
    result = start_run(load_config(None, tiny_overrides), out, listener)
    assert listener.earlier == []
    assert [row.round for row in listener.rows] == [1, 2, 3]
    assert len(listener.replies) == 6
    assert listener.results == [result]


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DroppeftError, match="file: cannot be locked"), locked(tmp_path / "file"):
        pass


def test_a_lock_is_private_and_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


def test_data_that_changed_are_refused(tiny_overrides: list[str], tmp_path: Path) -> None:
    source = Path(tiny_overrides[1].partition("=")[2])
    data = shutil.copytree(source, tmp_path / "data")
    out = tmp_path / "run"
    stop_after(1, [*tiny_overrides, f"data={data}"], out)
    before = (out / "rounds.jsonl").read_bytes()
    text = (data / "train.csv").read_text()
    (data / "train.csv").write_text(text.replace("bread", "toast", 1))
    with pytest.raises(DroppeftError, match="the data differs"):
        resume_run(out, Recorder())
    assert (out / "rounds.jsonl").read_bytes() == before


def test_another_backbone_is_refused(tiny_overrides: list[str], tmp_path: Path) -> None:
    model = next(word.partition("=")[2] for word in tiny_overrides if word.startswith("model="))
    copy = shutil.copytree(model, tmp_path / "model")
    out = tmp_path / "run"
    stop_after(1, [*tiny_overrides, f"model={copy}"], out)
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "layer.0.attention.self.query.weight" in name)
    save_file({**weights, name: weights[name] + 1}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(DroppeftError, match="the model differs"):
        resume_run(out, Recorder())


def test_a_changed_setting_is_named(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop_after(2, tiny_overrides, out)
    config = out / "config.toml"
    whole = config.read_text()
    config.write_text(whole.replace("\nrounds = 3", "\nrounds = 1").replace("rank = 8", "rank = 4"))
    with refused(
        r"config.toml: has other settings than the run was started with: rounds=1 \(was 3\), "
        r"adapter.rank=4 \(was 8\); put them back, or start a new run"
    ):
        resume_run(out, Recorder())
    config.write_text(whole.replace('"droppeft"', '"fedlora"').replace("mean = 0.25", "mean = 0.0"))
    for use in (lambda: resume_run(out, Recorder()), lambda: saved_model(out, None, None)):
        with refused(r'settings .*: method="fedlora" \(was "droppeft"\), dropout.mean=0.0 \(was'):
            use()
    data = load_config(config).data
    moved = shutil.copytree(data, tmp_path / "moved")
    config.write_text(whole.replace(data, str(moved)))
    hashes = [resume_run(folder, Recorder())["adapter_sha256"] for folder in (out, whole_run)]
    assert hashes[0] == hashes[1]


def test_missing_rows_are_refused(tiny_overrides: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop_after(2, tiny_overrides, out)
    (out / "rounds.jsonl").write_text("")
    with pytest.raises(DroppeftError, match="has 0 of the 2 rounds that are saved"):
        resume_run(out, Recorder())


def test_a_run_may_use_the_current_folder(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start_run(load_config(None, [*tiny_overrides, "rounds=1"]), Path(), Recorder())
    assert (tmp_path / "result.json").exists()


def test_more_tokens_than_positions_are_refused(tiny_overrides: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*tiny_overrides, "training.max_length=1000"])
    with pytest.raises(DroppeftError, match="max_length=1000 is more than the 512 positions"):
        start_run(config, tmp_path / "run", Recorder())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(DroppeftError, match=r"holds no run to resume \(no config.toml\)"):
        resume_run(tmp_path, Recorder())


def test_an_empty_folder_is_free_and_a_full_one_is_not(tmp_path: Path) -> None:
    check_free(tmp_path)
    check_free(tmp_path / "a" / "b")
    (tmp_path / "a").write_text("")
    with pytest.raises(DroppeftError, match=r"exists already; choose another folder$"):
        check_free(tmp_path)
    with pytest.raises(DroppeftError, match=r"cannot write in .*; choose another folder"):
        check_free(tmp_path / "a" / "b")


@pytest.mark.sample("3-1")
@pytest.mark.parametrize(("call", "saved"), [(1, 0), (3, 1), (5, 2)])
def test_an_interrupt_reports_the_last_saved_round(
    call: int, saved: int, tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "droppeft.server.run.append_rows", call, True, KeyboardInterrupt)
        with pytest.raises(Interrupted) as stopped:
            start_run(load_config(None, tiny_overrides), out, Recorder())
    assert stopped.value.round == saved
    assert checkpoint_of(out).round == saved
    resume_run(out, Recorder())
    assert outcome(out) == outcome(whole_run)


# Real processes and real signals


ROUNDS = 20


@pytest.fixture(scope="module")
def long_words(tiny_overrides: list[str]) -> list[str]:
    """A run that takes long enough to be hit in the middle."""
    return [*tiny_overrides, f"rounds={ROUNDS}"]


@pytest.fixture(scope="module")
def long_run(long_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("long") / "run"
    start_run(load_config(None, long_words), out, Recorder())
    return outcome(out)


def launch(words: list[str], out: Path, before: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", before + MAIN, "run", *words, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        # A process that a script starts in the background ignores Ctrl-C, and so would this child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process: "subprocess.Popen[str]", ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def two_rows(out: Path) -> bool:
    ledger = out / "rounds.jsonl"
    return ledger.exists() and ledger.read_text().count("\n") >= 2


@pytest.mark.full
@pytest.mark.parametrize(
    "ready", [lambda out: (out / "checkpoints" / "round-00001.safetensors").exists(), two_rows]
)
def test_a_killed_process_leaves_a_run_that_ends_the_same(
    ready: Callable[[Path], bool], long_words: list[str], long_run: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch(long_words, out)
    wait_for(process, lambda: ready(out))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 1 <= checkpoint_of(out).round < ROUNDS
    resume_run(out, Recorder())
    assert outcome(out) == long_run


@pytest.mark.full
def test_a_process_killed_within_the_adapter(
    tiny_overrides: list[str], whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch(tiny_overrides, out, KILLED_IN_EXPORT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (out / "adapter").exists()
    resume_run(out, Recorder())
    assert outcome(out) == outcome(whole_run)
    assert list(out.rglob("*.partial")) == []


@pytest.mark.full
def test_an_interrupted_process_says_how_to_go_on(
    long_words: list[str], long_run: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch(long_words, out)
    wait_for(process, lambda: two_rows(out))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("droppeft: stopped after round ")
    assert errors.endswith(f"which is saved; go on with: droppeft resume {out}\n")
    assert errors.count("\n") == 1
    resume_run(out, Recorder())
    assert outcome(out) == long_run


# Clients that do not reply


class Unreachable:
    """The transport in process, but in some rounds no client replies."""

    def __init__(self, loaded: Loaded, lost: Collection[int]) -> None:
        self.inner = InProcess(clients_of(loaded))
        self.lost = lost

    def exchange(self, instructions: Sequence[Instruction]) -> Iterator[Arrival]:
        for arrival in self.inner.exchange(instructions):
            client = instructions[arrival.index].client
            lost = instructions[0].round in self.lost
            yield replace(arrival, reply=Failure(client, "asleep")) if lost else arrival


def run_with_losses(words: list[str], out: Path, rounds: int, *lost: int) -> None:
    config = load_config(None, [*words, f"rounds={rounds}"])
    start_run(config, out, Recorder(), lambda loaded: nullcontext(Unreachable(loaded, lost)))


def test_three_lost_rounds_end_a_run_that_can_be_resumed(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    message = rf"in 3 rounds in a row \(client \d: asleep\); correct this, then resume {out}$"
    with pytest.raises(DroppeftError, match=message):
        run_with_losses(tiny_overrides, out, 6, 2, 3, 4)
    assert [row["accepted"] for row in rows_of(out / "rounds.jsonl")] == [2, 0, 0, 0]
    result = resume_run(out, Recorder())
    assert result["rounds"] == 6


def test_a_run_continues_after_two_lost_rounds(tiny_overrides: list[str], tmp_path: Path) -> None:
    run_with_losses(tiny_overrides, tmp_path / "run", 6, 1, 2, 5, 6)
    assert (tmp_path / "run" / "result.json").exists()


def test_a_run_whose_last_rounds_are_lost_still_has_a_result(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    run_with_losses(tiny_overrides, tmp_path / "run", 4, 2, 3, 4)
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.sample("1")
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_short_run_without_any_merged_update_is_an_error(
    tiny_overrides: list[str], tmp_path: Path, rounds: int
) -> None:
    with pytest.raises(DroppeftError, match=rf"in {rounds} rounds? in a row .* start a new run"):
        run_with_losses(tiny_overrides, tmp_path / "run", rounds, 1, 2)
    assert not (tmp_path / "run" / "adapter").exists()
