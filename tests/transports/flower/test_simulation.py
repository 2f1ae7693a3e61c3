"""The same result in this process and in Flower's simulation."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from droppeft.config import load_config
from droppeft.errors import DroppeftError
from droppeft.runs.ledger import RoundRow
from droppeft.runs.write_sites import write_sites
from droppeft.server.run import start_run
from droppeft.transports.flower.simulation import ATTEMPTS, _processes, _start_ray
from refusals import refused
from runs import Recorder, outcome, rows_of


def comparable(out: Path) -> dict[str, Any]:
    """What a run writes, without what may differ: clocks, the transport and its settings."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("transport", "flower")}
        return [strip(item) for item in value] if isinstance(value, list) else value

    result: dict[str, Any] = strip(outcome(out))
    lines = result["config"].decode().splitlines()
    other = ("transport = ", "nodes_timeout_s = ")
    return {**result, "config": [line for line in lines if not line.startswith(other)]}


SHARING = (
    "sharing.fraction=0.5",
    "sharing.criterion=cka",
    "traffic.encoding=int8",
    "clients=3",
    "rounds=4",
)
"""Client state is saved by the processes that run the clients."""

SLOW = "flower.nodes_timeout_s=1800"
"""Other tests may keep the machine busy while the processes of a simulation start."""


@pytest.fixture(scope="module")
def sharing_run(
    tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("sharing") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DROPPEFT_STATE", str(out.parent / "state"))
        start_run(load_config(None, [*tiny_overrides, *SHARING]), out, Recorder())
        yield out


def test_a_simulation_is_the_run_in_process(
    tiny_overrides: list[str], sharing_run: Path, tmp_path: Path
) -> None:
    class Looks(Recorder):
        def round_done(self, row: RoundRow) -> None:
            super().round_done(row)
            self.priorities = {process.nice() for process in _processes()}

    out, listener = tmp_path / "run", Looks()
    words = [*tiny_overrides, *SHARING, "transport=flower", SLOW]
    start_run(load_config(None, words), out, listener)
    assert comparable(out) == comparable(sharing_run)
    assert listener.priorities == {psutil.Process().nice()}


@pytest.mark.full
def test_a_simulation_of_sites_is_the_run_in_process(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sites(load_config(None, [*tiny_overrides, *SHARING]), tmp_path / "sites")
    for name, more in (("here", ()), ("simulated", ("transport=flower", SLOW))):
        monkeypatch.setenv("DROPPEFT_STATE", str(tmp_path / f"state {name}"))
        config = load_config(tmp_path / "sites" / "run.toml", more)
        start_run(config, tmp_path / name, Recorder())
    assert comparable(tmp_path / "simulated") == comparable(tmp_path / "here")


@pytest.mark.parametrize("failures", [1, ATTEMPTS])
def test_ray_is_started_again_if_it_fails(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives up when the machine is so busy that a process of its own is late."""
    attempts: list[int] = []

    def init(num_cpus: int, **_: object) -> None:
        attempts.append(num_cpus)
        if len(attempts) <= failures:
            raise RuntimeError("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: len(attempts) > failures)
    if failures == ATTEMPTS:
        with refused(r"did not start in 3 attempts \(The current .* startup.*transport=in_process"):
            _start_ray(2)
    else:
        _start_ray(2)
    assert attempts == [2] * min(failures + 1, ATTEMPTS)


@pytest.mark.full
def test_a_base_delta_reaches_the_clients_of_a_simulation(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    plain = [word for word in tiny_overrides if not word.startswith("dropout.")]
    results = []
    for transport in ("in_process", "flower"):
        out = tmp_path / transport
        words = [*plain, "method=fedex_lora", f"transport={transport}"]
        words += [SLOW] if transport == "flower" else []
        start_run(load_config(None, words), out, Recorder())
        (out / "adapter").mkdir()  # with a base delta, no adapter is written
        results.append(comparable(out))
    assert results[0] == results[1]


@pytest.mark.full
def test_killing_a_process_of_the_simulation_costs_only_the_replies_of_its_clients(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    class Kills(Recorder):
        def round_done(self, row: RoundRow) -> None:
            super().round_done(row)
            if row.round == 1:
                self.processes = _processes()
                self.processes[0].kill()

    listener = Kills()
    many = ["transport=flower", SLOW, "rounds=40", "cohort_size=4", "evaluation.every=40"]
    start_run(load_config(None, [*tiny_overrides, *many]), tmp_path / "run", listener)
    accepted = [row.accepted for row in listener.rows]
    assert accepted[0] == accepted[-1] == 4
    assert min(accepted) < 4
    _, alive = psutil.wait_procs(listener.processes, timeout=20)
    assert alive == []


@pytest.mark.full
def test_closing_a_simulation_ends_local_trainings_that_are_not_finished(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    words = [
        *tiny_overrides,
        "transport=flower",
        SLOW,
        "flower.deadline_s=1",
        "training.local_steps=100000",
    ]
    start = time.monotonic()
    # Flower discards a message at its deadline, on a busy machine perhaps before the server does.
    with pytest.raises(DroppeftError, match=r"no reply within 1 s|is gone: late"):
        start_run(load_config(None, words), tmp_path / "run", Recorder())
    assert time.monotonic() - start < 120
    assert _processes() == []


@pytest.mark.full
def test_files_that_changed_fail_with_a_sentence_and_the_run_stops(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sends a wrong hash, as if the texts had changed after it read them."""
    from droppeft.transports.flower import grid

    original = grid.identity
    monkeypatch.setattr(grid, "identity", lambda loaded: {**original(loaded), "data_hash": "other"})
    out = tmp_path / "run"
    words = [*tiny_overrides, "transport=flower", SLOW, "rounds=9"]
    with pytest.raises(DroppeftError, match="3 rounds in a row") as error:
        start_run(load_config(None, words), out, Recorder())
    assert "the data differs (expected other, found " in str(error.value)
    assert str(error.value).endswith(f"correct this, then resume {out}")
    assert [row["accepted"] for row in rows_of(out / "rounds.jsonl")] == [0, 0, 0]
    assert not (out / "result.json").exists()
    assert json.loads((out / "rounds.jsonl").read_text().splitlines()[0])["failures"]
