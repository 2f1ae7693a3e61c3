"""The ledger: sums, targets and rows on disk, with numbers worked out by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from droppeft.costs.modelled_clock import ClientCost, RoundCost
from droppeft.messages.instruction import BaseDelta, LayerDropout
from droppeft.messages.reply import Failure, Reply
from droppeft.runs.ledger import (
    ClosedRound,
    RoundEvaluation,
    RoundRow,
    append_rows,
    client_row,
    round_row,
)
from droppeft.runs.read_ledger import read_ledger, read_rounds, read_rows
from droppeft.runs.summary import summarise, target_round
from droppeft.tasks.metrics import ACCURACY, LOSS
from handmade import COST, instruction_for, update_for
from refusals import refused

MODELLED = ClientCost(
    "phone", download_s=1.0, train_s=8.0, reward_s=2.0, upload_s=4.0, energy_j=7.0
)


def row(round: int, accuracy: float | None, **changes: Any) -> RoundRow:
    typical = RoundRow(
        round=round,
        cohort=[0],
        accepted=1,
        failures=[],
        quality={"global_accuracy": accuracy, "global_f1": accuracy, "global_loss": None},
        diverged=False,
        validation_loss=None,
        train_loss=1.0 / round,
        mean_active_layers=3.0,
        mean_forward_layers=0.5,
        mean_skipped_layers=0.5,
        activation_bytes_peak=100,
        upload_bytes=10,
        download_bytes=20,
        round_measured_s=2.0,
        train_wall_s=1.0,
        evaluation_wall_s=0.5,
        saving_wall_s=0.1,
        host_wall_s=3.0,
        absent=[],
        late=[],
        surplus=[],
        set_aside=[],
        clipped=[],
        limited=[],
        opposed=[],
        round_modelled_s=15.0,
        energy_modelled_j=7.0,
        idle_modelled_share=None,
        coverage=[],
        layer_steps=[],
        importance=[],
        notes=None,
    )
    return replace(typical, **changes)


def rows_with(*accuracies: float | None) -> list[RoundRow]:
    return [row(number, value) for number, value in enumerate(accuracies, start=1)]


@pytest.mark.parametrize(
    ("accuracies", "target", "reached"),
    [
        ([0.7, 0.7, 0.7], 0.7, 3),  # their mean is 0.6999999999999998 in floating point
        ([0.6, 0.9], 0.5, 2),  # (0.0 + 0.6 + 0.9) / 3 = 0.5: the accuracy before round 1 counts
        ([0.6, 0.9], 0.51, None),
        ([1.0, 0.0, 0.5, 1.0, 1.0], 0.8, 5),  # (0.5 + 1.0 + 1.0) / 3; a single 1.0 is not enough
        ([1.0], 0.1, None),  # two evaluations are too few for a mean of three
        ([0.6, None, 0.9], 0.5, 3),  # rounds without evaluation are skipped
        ([None, None, None], 0.0, None),
        ([1.0, 1.0, 1.0], None, None),
        ([], 0.0, None),
    ],
)
def test_a_target_is_reached_by_a_mean_of_three(
    accuracies: list[float | None], target: float | None, reached: int | None
) -> None:
    assert target_round(enumerate(accuracies, start=1), 0.0, target, ACCURACY) == reached


def test_a_summary_adds_up() -> None:
    rows = [
        row(1, 0.5, activation_bytes_peak=300),
        row(2, None, mean_active_layers=None, mean_forward_layers=None, mean_skipped_layers=None),
        row(3, 0.75, mean_active_layers=2.0),
        row(4, 0.7),
    ]
    summary = summarise(rows, {"accuracy": 0.25, "loss": 2.0}, ACCURACY, 0.5)
    assert summary == {
        "rounds": 4,
        "first_accuracy": 0.5,
        "best_accuracy": 0.75,
        "first_round": 1,
        "best_round": 3,
        "train_loss": 0.25,
        "mean_active_layers": pytest.approx((3 + 2 + 3) / 3),
        "mean_forward_layers": 0.5,
        "mean_skipped_layers": 0.5,
        "activation_bytes_peak": 300,
        "upload_bytes": 40,
        "download_bytes": 80,
        "round_measured_s": 8.0,
        "round_modelled_s": 60.0,
        "energy_modelled_j": 28.0,
        "idle_modelled_share": None,
        "train_wall_s": 4.0,
        "evaluation_wall_s": 2.0,
        "host_wall_s": 12.0,
        "target": 0.5,
        "target_round": 3,  # (0.25 + 0.5 + 0.75) / 3 = 0.5
        "time_to_target_measured_s": 6.0,  # three rounds of 2 s
        "time_to_target_modelled_s": 45.0,  # three rounds of 15 s
        "time_to_target_host_s": 7.5,  # three rounds of 3 s less 0.5 s of measuring
    }


def test_the_best_round_is_the_first_of_equals() -> None:
    assert summarise(rows_with(0.5, 0.8, 0.8), {"accuracy": 0.1}, ACCURACY, None)["best_round"] == 2


def test_a_summary_of_nothing_measured() -> None:
    summary = summarise(rows_with(None, None), {"accuracy": 0.3}, ACCURACY, 0.9)
    assert (summary["best_accuracy"], summary["best_round"]) == (None, None)
    assert summary["first_accuracy"] is None
    assert summary["time_to_target_measured_s"] is None
    assert summary["time_to_target_host_s"] is None
    assert summary["time_to_target_modelled_s"] is None


def test_without_a_clock_there_are_no_modelled_totals() -> None:
    without = {"round_modelled_s": None, "energy_modelled_j": None}
    rows = [row(round, 0.9, **without) for round in (1, 2, 3)]
    summary = summarise(rows, {"accuracy": 0.9}, ACCURACY, 0.9)
    assert summary["target_round"] == 2
    for name in ("round_modelled_s", "time_to_target_modelled_s", "energy_modelled_j"):
        assert summary[name] is None


def test_a_round_is_summarised() -> None:
    instructions = [instruction_for(client) for client in (1, 4, 6)]
    slow = replace(COST, total_wall_s=9.0, activation_bytes_peak=70, forward_tokens=(0, 32, 0, 0))
    replies: list[Reply] = [
        update_for(instructions[0], train_loss=0.5),
        Failure(4, "sent no reply"),
        update_for(
            instructions[2],
            train_loss=1.0,
            steps=6,
            active_steps=(6, 3, 3, 6),
            importance=(0.0, 0.2, 0.3, 1.2),
            tensors={0: update_for(instructions[2]).tensors[0]},
            cost=slow,
        ),
    ]
    quality = {"global_accuracy": 0.8, "global_f1": 0.7, "global_loss": 0.4}
    faster = replace(MODELLED, train_s=3.0)
    modelled = RoundCost((MODELLED, None, faster), late=(), surplus=(), round_s=15.0, absent=(8,))
    closed = ClosedRound(1, (*instructions,), (*replies,), (*replies,), modelled, 0.25)
    evaluation = RoundEvaluation(quality, 1.5, validation_loss=0.6, download_bytes=7)
    made = round_row(closed, evaluation, 0.2, 20.0, {"arm": 1})
    assert made == RoundRow(
        round=1,
        cohort=[1, 4, 6],
        accepted=2,
        failures=[{"client": 4, "reason": "sent no reply"}],
        quality=quality,
        diverged=False,
        validation_loss=0.6,
        train_loss=0.75,
        mean_active_layers=(6 + 18) / (2 + 6),  # over steps, not over clients
        mean_forward_layers=(4 * 8 - 24) * (32 / 128) / 8,  # by tokens, of what was not trained
        mean_skipped_layers=(4 * 8 - 24) * (96 / 128) / 8,
        activation_bytes_peak=100,
        upload_bytes=36 + 8,  # nine values of 4 bytes, and two
        download_bytes=3 * 36 + 7,
        round_measured_s=9.25,
        train_wall_s=4.0,
        evaluation_wall_s=1.5,
        saving_wall_s=0.2,
        host_wall_s=20.0,
        absent=[8],
        late=[],
        surplus=[],
        set_aside=[],
        clipped=[],
        limited=[],
        opposed=[],
        round_modelled_s=15.0,
        energy_modelled_j=14.0,
        coverage=[2, 1, 1, 1],
        layer_steps=[2 + 6, 1 + 3, 1 + 3, 2 + 6],
        importance=pytest.approx([0.1, 0.2, 0.3, 0.8]),
        idle_modelled_share=pytest.approx(1 - (15 + 10) / (2 * 15)),
        notes={"arm": 1},
    )


def test_late_and_surplus_clients_count_in_costs() -> None:
    instructions = [instruction_for(client) for client in (1, 4, 6)]
    checked: list[Reply] = [update_for(instruction) for instruction in instructions]
    replies: list[Reply] = [checked[0], Failure(4, "late: it was"), Failure(6, "surplus: it was")]
    modelled = RoundCost((MODELLED, MODELLED, MODELLED), late=(4,), surplus=(6,), round_s=15.0)
    closed = ClosedRound(1, (*instructions,), (*checked,), (*replies,), modelled, 0.0)
    made = round_row(closed, RoundEvaluation({}), 0.0, 0.0)
    assert (made.cohort, made.accepted, made.failures) == ([1, 4, 6], 1, [])
    assert (made.late, made.surplus) == ([4], [6])
    assert (made.upload_bytes, made.train_wall_s, made.energy_modelled_j) == (3 * 36, 6.0, 21.0)


def test_a_client_s_row() -> None:
    instruction = instruction_for(4, dropout=LayerDropout((0.0, 0.5, 0.5, 0.0), "exact"))
    answer = update_for(instruction, reward=0.1)
    made = client_row(instruction, answer, answer, MODELLED)
    assert made == json.loads(json.dumps(made))
    assert (made["round"], made["client"], made["accepted"]) == (1, 4, True)
    assert made["rates"] == [0.0, 0.5, 0.5, 0.0]
    assert (made["upload_bytes"], made["download_bytes"]) == (36, 36)
    assert (made["active_steps"], made["reward"], made["tokens"]) == ([2, 1, 1, 2], 0.1, 64)
    assert made["layer_tokens"] == [64, 32, 32, 64]
    assert (made["profile"], made["client_modelled_s"], made["energy_modelled_j"]) == (
        "phone",
        15.0,
        7.0,
    )
    parts = ("download", "train", "reward", "upload")
    assert [made[f"{part}_modelled_s"] for part in parts] == [1.0, 8.0, 2.0, 4.0]
    late = client_row(instruction, answer, Failure(4, "late: it was"), MODELLED)
    assert late == {**made, "accepted": False, "reason": "late: it was"}
    lost = Failure(4, "sent no reply")
    failed = client_row(instruction_for(4), lost, lost, None)
    assert (failed["accepted"], failed["rates"]) == (False, None)
    assert failed["reason"] == "sent no reply"


def losses(*values: float | None) -> list[RoundRow]:
    """Rounds of a task whose metrics are loss and perplexity."""
    return [
        row(round, None, quality={"global_loss": value, "global_perplexity": value and 2**value})
        for round, value in enumerate(values, start=1)
    ]


@pytest.mark.parametrize(
    ("values", "target", "reached"),
    [
        ([3.0, 2.0, 1.0, 1.0, 1.0], 2.0, 3),
        ([1.0, 1.0], 2.0, 2),  # the mean with the 4.0 before round 1 is exactly 2.0
        ([1.0, 1.1], 2.0, None),
        ([1.0, None, 1.0, 1.0], 2.0, 3),
        ([1.0, float("nan"), 1.0, 1.0, 1.0], 2.0, 5),
        ([3.0] * 5, 2.0, None),
        ([1.0] * 5, None, None),
    ],
)
def test_a_target_of_a_loss_is_reached_from_above(
    values: list[float | None], target: float | None, reached: int | None
) -> None:
    assert target_round(enumerate(values, start=1), 4.0, target, LOSS) == reached


def test_the_best_round_of_a_loss_is_its_lowest() -> None:
    initial = {"loss": 4.0, "perplexity": 16.0}
    summary = summarise(losses(3.0, None, 0.5, 0.5, 0.7), initial, LOSS, 1.5)
    assert (summary["first_loss"], summary["best_loss"], summary["best_round"]) == (3.0, 0.5, 3)
    assert summary["target_round"] == 4  # (3 + .5 + .5) / 3 is 1.33, and with 4 in place of .5 2.5
    assert summary["time_to_target_measured_s"] == 8.0  # four rounds of 2 s
    assert not [name for name in summary if name.endswith("accuracy")]


def test_a_row_comes_back_from_its_columns() -> None:
    made = [row(1, 0.5), *losses(3.0), row(2, None, quality={"global_loss": None})]
    columns = [one.as_columns() for one in made]
    assert [RoundRow.from_columns(json.loads(json.dumps(one))) for one in columns] == made
    assert "quality" not in columns[0]
    assert (columns[0]["global_accuracy"], columns[1]["global_perplexity"]) == (0.5, 8.0)
    with pytest.raises(KeyError, match="train_loss"):
        RoundRow.from_columns({k: v for k, v in columns[0].items() if k != "train_loss"})


# On disk


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_rows(path, [{"round": 1, "é": None}, {"round": 2}])
    append_rows(path, [])
    append_rows(path, [{"round": 3}])
    assert read_rows(path) == [{"round": 1, "é": None}, {"round": 2}, {"round": 3}]


@pytest.mark.parametrize("incomplete", ['{"round": 3', "{", '{"round": 3, "reason": "\\u00'])
def test_an_incomplete_last_line_is_ignored(tmp_path: Path, incomplete: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"round": 1}, {"round": 2}])
    with path.open("a") as file:
        file.write(incomplete)
    assert read_rows(path) == [{"round": 1}, {"round": 2}]


DAMAGED_LINES = ("", "[]", "null", '{"round": "2"}', '{"client": 1}', '{"round": NaN}', "{", "\0")


@pytest.mark.parametrize("line", DAMAGED_LINES)
def test_another_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"round": 1}}\n{line}\n{{"round": 2}}\n')
    with refused(r"rows.jsonl: line 2 is damaged; put the file back, or start a new run"):
        read_rows(path)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path, huge = tmp_path / "rows.jsonl", 1.7e308
    instructions = (instruction_for(0), instruction_for(1))
    replies = tuple(update_for(instruction, train_loss=huge) for instruction in instructions)
    modelled = RoundCost((None, None), late=(), surplus=(), round_s=0.0)
    closed = ClosedRound(1, instructions, replies, replies, modelled, 0.0)
    one = round_row(closed, RoundEvaluation({}), 0.0, 0.0)
    assert one.train_loss == math.inf
    append_rows(
        path, [one.as_columns(), {"round": 2, "scores": [1.0, math.nan], "a": {"b": -math.inf}}]
    )
    lines = path.read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first["train_loss"] is None
    assert second == {"round": 2, "scores": [1.0, None], "a": {"b": None}}
    assert one.as_saved() == RoundRow.from_columns(first)


def ledger(folder: Path, *clients: tuple[int, int]) -> list[RoundRow]:
    """Write a ledger of two rounds with two clients each, and the rows of some clients."""
    rows = [row(round, 0.5, cohort=[4, 7]) for round in (1, 2, 3)]
    append_rows(folder / "rounds.jsonl", [one.as_columns() for one in rows])
    written = [{"round": round, "client": client, "accepted": True} for round, client in clients]
    append_rows(folder / "clients.jsonl", written)
    return rows


def read_two_rounds(folder: Path) -> list[RoundRow]:
    return read_ledger(folder / "rounds.jsonl", folder / "clients.jsonl", 2)


def test_rows_without_a_checkpoint_are_removed_for_good(tmp_path: Path) -> None:
    whole = [(1, 4), (1, 7), (2, 4), (2, 7)]
    rows = ledger(tmp_path, *whole, (3, 4))
    for name in ("rounds.jsonl", "clients.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"round"')
    assert read_two_rounds(tmp_path) == rows[:2]
    left = [(one["round"], one["client"]) for one in read_rows(tmp_path / "clients.jsonl")]
    assert left == whole
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("clients", "why"),
    [
        ([(1, 4), (1, 7), (2, 4)], r"round 2 are not those .* \(client 7 is missing\)"),
        ([(1, 4), (1, 7)], r"round 2 are not those .* \(client 4 is missing\)"),
        ([(1, 4), (1, 7), (1, 7), (2, 4), (2, 7)], r"round 1 are not those .* \(it has 3 rows\)"),
    ],
)
def test_rows_of_clients_that_do_not_fit_their_round_are_refused(
    tmp_path: Path, clients: list[tuple[int, int]], why: str
) -> None:
    ledger(tmp_path, *clients)
    before = (tmp_path / "rounds.jsonl").read_bytes()
    with refused(rf"clients.jsonl: its rows of {why}; put the file back"):
        read_two_rounds(tmp_path)
    assert (tmp_path / "rounds.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"cohort": "4"}, "has a wrong cohort"), ({"accepted": None}, "has a wrong accepted")],
)
def test_a_row_with_a_value_of_another_type_is_refused(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    append_rows(tmp_path / "rounds.jsonl", [{**row(1, 0.5).as_columns(), **changes}])
    with refused(f"rounds.jsonl: the row of round 1 {why}"):
        read_rounds(tmp_path / "rounds.jsonl")


def test_a_base_delta_counts_as_traffic() -> None:
    delta = BaseDelta("v1", {"w": np.zeros((10, 10), np.float32)})
    instruction = instruction_for(4, base_delta=delta)
    lost = Failure(4, "lost")
    assert client_row(instruction, lost, lost, None)["download_bytes"] == 36 + 400
    nobody = RoundCost((None,), late=(), surplus=(), round_s=0.0)
    closed = ClosedRound(1, (instruction,), (lost,), (lost,), nobody, 0.0)
    row = round_row(closed, RoundEvaluation({}), 0.0, 0.0)
    assert row.download_bytes == 36 + 400
