"""Comparisons: which runs there are, that each is run once, and how they are summarised."""

import csv
import io
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from droppeft import cli
from droppeft.command_line_exit import FAILED, USER_ERROR
from droppeft.comparison.answer import answer
from droppeft.comparison.grid import (
    Comparison,
    cells,
    named_on_the_command_line,
    read_comparison,
)
from droppeft.comparison.runner import done, run_cells
from droppeft.comparison.study_files import (
    DEFINITION,
    RUNS,
    STUDY,
    Row,
    RunRecord,
    Study,
    Target,
    read_tables,
    write_tables,
)
from droppeft.comparison.summary import baseline_of, summary, target_values
from droppeft.comparison.writers import (
    COLUMNS,
    CSV,
    MARKDOWN,
    as_csv,
    as_markdown,
    failures,
    write,
)
from droppeft.config import resolve
from droppeft.data.sources import load_text
from droppeft.errors import DroppeftError
from droppeft.methods import method_named
from droppeft.report.show_comparison import show
from droppeft.server import run as running
from droppeft.server.run import Interrupted
from droppeft.tasks.metrics import ACCURACY, F1, LOSS
from runs import Recorder, rows_of, stop_after_a_round, timeless


def comparison(**settings: Any) -> Comparison:
    variants = {"full": ["method=fedlora"], "dropped": ["method=droppeft", "dropout.mean=0.25"]}
    return Comparison.model_validate({"variants": variants, "seeds": [0, 1], **settings})


def study_of(**settings: Any) -> Study:
    return comparison(**settings).study()


# Which runs


def test_variants_alternate_within_every_seed_and_data_set() -> None:
    found = cells(comparison(data=["a", "b"], models=["m"]))
    order = [(cell.seed, cell.data, cell.variant) for cell in found]
    assert order == [
        (seed, data, variant)
        for seed in (0, 1)
        for data in ("a", "b")
        for variant in ("full", "dropped")
    ]
    assert {cell.model for cell in found} == {"m"}
    assert found[0].config.method == "fedlora"
    assert found[1].config.dropout.mean == 0.25
    assert len({cell.folder for cell in found}) == 8


def test_a_variant_s_settings_win_over_common_ones() -> None:
    [cell] = cells(
        Comparison.model_validate(
            {
                "settings": ["rounds=3", "cohort_size=2"],
                "variants": {"a": ["rounds=7"]},
                "seeds": [4],
            }
        )
    )
    assert (cell.config.rounds, cell.config.cohort_size, cell.config.seed) == (7, 2, 4)


def test_settings_of_data_win_over_common_ones_and_a_variant_s_over_both() -> None:
    found = cells(
        Comparison.model_validate(
            {
                "settings": ["rounds=3", "training.local_epochs=2"],
                "data": ["easy", "hard"],
                "data_settings": {"hard": ["rounds=9", "training.local_steps=4"]},
                "variants": {"a": [], "b": ["rounds=5"]},
                "seeds": [0],
            }
        )
    )
    training = [
        (one.config.training.local_steps, one.config.training.local_epochs) for one in found
    ]
    assert [one.config.rounds for one in found] == [3, 5, 9, 5]
    assert training == [(None, 2), (None, 2), (4, None), (4, None)]


def test_a_folder_s_name_follows_from_the_configuration() -> None:
    [one, _] = cells(comparison(seeds=[0], data=["/x/ag_news"]))
    assert one.folder.startswith("full-ag_news-builtin-seed0-")
    [again, _] = cells(comparison(seeds=[0], data=["/x/ag_news"]))
    assert again.folder == one.folder
    [changed, _] = cells(comparison(seeds=[0], data=["/x/ag_news"], settings=["rounds=4"]))
    assert changed.folder != one.folder


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"variants": {}}, "variants"),
        ({"seeds": [1, 1]}, "a seed is listed twice"),
        ({"baseline": "nobody"}, "baseline='nobody' is not one of the variants full, dropped"),
        ({"target": {"variant": "x"}}, "target.variant='x' is not one of the variants"),
        ({"target": {}}, "give target.value or target.variant"),
        (
            {"target": {"value": 0.5, "variant": "full"}},
            "give target.value or target.variant",
        ),
        ({"targets": {}}, "targets"),
        ({"data_settings": {"x": ["rounds=2"]}}, "'x', which is not in data .nothing is listed"),
        ({"data": ["y"], "data_settings": {"x": []}}, "'x', which is not in data .y"),
    ],
)
def test_an_invalid_file_is_reported_in_one_sentence(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    import tomli_w

    path = tmp_path / "c.toml"
    tree = {"variants": {"full": ["method=fedlora"], "dropped": ["method=droppeft"]}, **settings}
    path.write_text(tomli_w.dumps(tree))
    with pytest.raises(DroppeftError, match=sentence) as found:
        read_comparison(path)
    assert "\n" not in str(found.value)


def test_an_invalid_setting_names_its_variant() -> None:
    with pytest.raises(DroppeftError, match=r"variant 'a': unknown key dropout.maen; did you mean"):
        cells(Comparison.model_validate({"variants": {"a": ["dropout.maen=1"]}}))
    with pytest.raises(DroppeftError, match="variant 'a': method=fedfoo: unknown method"):
        cells(Comparison.model_validate({"variants": {"a": ["method=fedfoo"]}}))


@pytest.mark.parametrize("setting", ["seed=3", "data=x"])
def test_settings_that_the_comparison_varies_are_refused(setting: str) -> None:
    tree = {"variants": {"a": ["method=fedlora"]}, "data": ["y"], "settings": [setting]}
    with pytest.raises(DroppeftError, match="is varied by the comparison; leave it out"):
        cells(Comparison.model_validate(tree))


def test_a_variant_s_setting_wins_over_a_mutually_exclusive_common_one() -> None:
    variants = {"a": ["method=droppeft", "training.local_epochs=1", "dropout.count=2"]}
    tree = {"variants": variants, "settings": ["training.local_steps=5", "dropout.mean=0.5"]}
    [cell, *_] = cells(Comparison.model_validate(tree))
    training = cell.config.training
    assert (training.local_epochs, training.local_steps) == (1, None)
    assert (cell.config.dropout.count, cell.config.dropout.mean) == (2, None)


def test_paths_are_absolute_in_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value of the variable gives another run."""
    tree = {"variants": {"a": ["method=fedlora"]}, "data": ["$SOME_DATA/x"], "seeds": [0]}
    names = []
    for place in ("one", "other"):
        (tmp_path / place / "x").mkdir(parents=True)
        monkeypatch.setenv("SOME_DATA", str(tmp_path / place))
        [cell] = cells(Comparison.model_validate(tree))
        assert cell.config.data == str(tmp_path / place / "x")
        assert cell.data == "$SOME_DATA/x"
        names.append(cell.folder)
    assert names[0] != names[1]


def test_a_target_on_the_command_line_is_the_comparison_s() -> None:
    found = named_on_the_command_line(["fedlora"], ["target=0.8"], [0])
    assert found.target is not None
    assert found.target.value == 0.8


def test_the_same_run_twice_is_refused() -> None:
    variants = {"a": ["method=fedlora"], "b": ["method=fedlora", "rounds=10"]}
    with pytest.raises(DroppeftError, match="'a' and 'b' are the same run"):
        cells(Comparison.model_validate({"variants": variants}))


# Running


class Silent:
    """A progress listener that notes which cells were run and which had been finished before."""

    def __init__(self) -> None:
        self.run: list[tuple[str, int]] = []
        self.finished: list[tuple[str, int]] = []

    def begins(self, cell: Any, number: int, of: int) -> Any:
        return Recorder()

    def done(self, record: RunRecord, wall_s: float | None) -> None:
        cells = self.finished if wall_s is None else self.run
        cells.append((record.variant, record.seed))


@pytest.fixture(scope="module")
def tiny(tiny_overrides: list[str]) -> Callable[..., Comparison]:
    common = [setting for setting in tiny_overrides if not setting.startswith("dropout.")]

    def make(**settings: Any) -> Comparison:
        return comparison(settings=[*common, "rounds=2"], **settings)

    return make


ALONE = {"variants": {"full": ["method=fedlora"]}}


@pytest.fixture(scope="module")
def finished(
    tiny: Callable[..., Comparison], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[RunRecord]]:
    """The folder and the records of one variant with seed 0."""
    out, progress = tmp_path_factory.mktemp("finished"), Silent()
    records = run_cells(cells(tiny(seeds=[0], **ALONE)), out, progress)
    assert progress.run == [("full", 0)]
    return out, list(records)


def test_paths_are_recorded_as_they_were_given(
    tiny: Callable[..., Comparison],
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [data] = [word for word in tiny().settings if word.startswith("data=")]
    monkeypatch.setenv("TINY_DATA", data.removeprefix("data="))
    monkeypatch.setenv("EARLIER", str(whole_run))
    words = [word for word in tiny().settings if word != data]
    found = tiny(seeds=[0], variants={"full": ["method=fedlora", "start_from=$EARLIER"]})
    found = found.model_copy(update={"settings": [*words, "data=$TINY_DATA"]})
    [record] = run_cells(cells(found), tmp_path, Silent())
    assert record.failure is None
    assert record.data == "$TINY_DATA"
    assert 'start_from="$EARLIER"' in record.settings


def test_finished_runs_are_not_repeated(
    tiny: Callable[..., Comparison], finished: tuple[Path, list[RunRecord]], tmp_path: Path
) -> None:
    out, [record] = shutil.copytree(finished[0], tmp_path / "out"), finished[1]
    progress = Silent()
    found, _ = run_cells(cells(tiny(seeds=[0, 1], **ALONE)), out, progress)
    assert (progress.finished, progress.run) == ([("full", 0)], [("full", 1)])
    assert found.result == record.result
    assert list(found.rows) == list(record.rows)


def test_a_stopped_run_is_continued(
    tiny: Callable[..., Comparison], finished: tuple[Path, list[RunRecord]], tmp_path: Path
) -> None:
    [cell] = cells(tiny(seeds=[0], **ALONE))
    arguments = [*tiny().settings, "method=fedlora", "seed=0"]
    stop_after_a_round(arguments, tmp_path / cell.folder)
    [record] = run_cells([cell], tmp_path, Silent())
    [whole] = finished[1]
    assert timeless(record.result) == timeless(whole.result)


def test_a_variant_that_fails_does_not_stop_the_others(
    tiny: Callable[..., Comparison], tmp_path: Path
) -> None:
    variants = {"wrong": ["method=fedlora", "frozen.layers=4"], **ALONE["variants"]}
    chosen = tiny(seeds=[0], variants=variants)
    with mock.patch("droppeft.tasks.classification.load_text", wraps=load_text) as reading:
        records = run_cells(cells(chosen), tmp_path, Silent())
    assert reading.call_count == 1
    assert [one.result is None for one in records] == [True, False]
    assert "leaves none of the 4 layers" in (records[0].failure or "")
    [part] = summary(chosen.study(), records)
    assert part.rows[0].quality is None
    assert part.rows[1].quality is not None
    assert "wrong failed: frozen.layers=4 leaves none" in as_markdown([part])


def test_any_error_becomes_the_variant_s_failure(
    tiny: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise ValueError("a\nb")

    monkeypatch.setattr("droppeft.comparison.runner.start_run", broken)
    records = run_cells(cells(tiny(seeds=[0])), tmp_path, Silent())
    assert [one.failure for one in records] == ["a", "a"]


def test_an_interruption_stops_the_comparison(
    tiny: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **options: Any) -> Any:
        raise Interrupted(tmp_path, 0)

    monkeypatch.setattr("droppeft.comparison.runner.start_run", stopped)
    with pytest.raises(Interrupted):
        run_cells(cells(tiny()), tmp_path, Silent())
    assert running.start_run is not stopped


# Summary


def a_run(variant: str, seed: int, accuracies: Sequence[float], round_s: float = 10.0) -> RunRecord:
    """A run with a round per accuracy; measured rounds take twice ``round_s``."""
    [cell] = [
        one for one in cells(comparison(seeds=[seed])) if (one.variant, one.seed) == (variant, seed)
    ]
    rows = [
        Row(
            round=number,
            global_accuracy=accuracy,
            round_modelled_s=round_s,
            round_measured_s=2 * round_s,
        )
        for number, accuracy in enumerate(accuracies, start=1)
    ]
    result = Row(
        global_accuracy=accuracies[-1],
        global_f1=accuracies[-1] / 2,
        initial_accuracy=0.1,
        activation_bytes_peak=100 * (seed + 1),
        upload_bytes=10,
        download_bytes=20 + seed,
        energy_modelled_j=None if variant == "dropped" else 5.0,
        round_modelled_s=round_s * len(rows),
        round_measured_s=2 * round_s * len(rows),
        **{"machine": {"cores": 2}, "versions": {"python": "3.11"}},
    )
    which = (cell.folder, cell.variant, cell.data, cell.model, cell.seed)
    return RunRecord(*which, (f"method={variant}", "rounds=4"), result, rows, [], None)


def with_result(run: RunRecord, **columns: Any) -> RunRecord:
    return replace(run, result=Row({**(run.result or {}), **columns}))


def lost(run: RunRecord) -> RunRecord:
    return replace(run, result=None, rows=[], failure="lost")


FULL = [a_run("full", 0, [0.5, 0.6, 0.7, 0.7]), a_run("full", 1, [0.5, 0.7, 0.8, 0.8])]
DROPPED = [a_run("dropped", seed, [0.6, 0.6, 0.6, 0.6], 5.0) for seed in (0, 1)]


def test_a_variant_s_row_by_hand() -> None:
    target = {"value": 0.6}
    [part] = summary(study_of(target=target), [*FULL, *DROPPED])
    full, dropped = part.rows
    assert full.quality is not None
    assert full.quality.mean == pytest.approx(0.75)
    assert full.quality.deviation == pytest.approx(0.05 * 2**0.5)
    assert full.f1 is not None
    assert full.f1.mean == pytest.approx(0.375)
    # The mean of three evaluations reaches .6 in round 3: (.5 + .6 + .7) / 3.
    assert full.time_to_target_modelled_s is not None
    assert full.time_to_target_modelled_s.mean == 30.0
    assert full.time_to_target_measured_s is not None
    assert full.time_to_target_measured_s.mean == 60.0
    assert dropped.time_to_target_modelled_s is not None
    assert dropped.time_to_target_modelled_s.mean == 15.0
    assert (full.speed_up_modelled, dropped.speed_up_modelled) == (1.0, 2.0)
    assert (full.speed_up_measured, dropped.speed_up_measured) == (1.0, 2.0)
    assert (full.reached, full.seeds) == (2, 2)
    assert (full.activation_bytes_peak, full.download_bytes) == (200, 20.5)
    assert (full.energy_modelled_j, dropped.energy_modelled_j) == (5.0, None)


def test_times_need_every_seed() -> None:
    runs = [a_run("dropped", 0, [0.6] * 4), a_run("dropped", 1, [0.5] * 4)]
    [part] = summary(study_of(target={"value": 0.6}), [*FULL, *runs])
    dropped = part.rows[1]
    assert (dropped.reached, dropped.seeds) == (1, 2)
    assert dropped.time_to_target_modelled_s is None
    assert dropped.speed_up_modelled is None
    assert "| dropped | .550 ± .071 | .275 ± .035 | 1 of 2 seeds | – |" in as_markdown([part])


def test_a_speed_up_is_over_the_seeds_that_a_variant_has() -> None:
    """The baseline takes 30 and 120 s; the variant has the second seed alone, 60 s: 120 / 60."""
    base = [a_run("full", 0, [0.7] * 4), a_run("full", 1, [0.7] * 4, 40.0)]
    own = a_run("dropped", 1, [0.6] * 4, 20.0)
    [part] = summary(study_of(target={"value": 0.6}), [*base, own])
    assert [row.speed_up_modelled for row in part.rows] == [1.0, 2.0]
    [part] = summary(study_of(target={"value": 0.6}), [base[0], own])
    assert part.rows[1].speed_up_modelled is None


def test_a_variant_without_global_model_has_no_count_of_reached_targets() -> None:
    own = [
        replace(
            with_result(run, global_accuracy=None, global_f1=None),
            rows=[Row({**row, "global_accuracy": None}) for row in run.rows],
        )
        for run in DROPPED
    ]
    [part] = summary(study_of(target={"value": 0.6}), [*FULL, *own])
    assert [row.reached for row in part.rows] == [2, None]
    assert "| dropped | – | – | – | – |" in as_markdown([part])


def test_the_baseline_can_be_named_and_is_fedlora_or_the_first_variant() -> None:
    chosen = comparison(target={"value": 0.6}, baseline="dropped")
    [part] = summary(chosen.study(), [*FULL, *DROPPED])
    assert [row.speed_up_modelled for row in part.rows] == [0.5, 1.0]
    assert baseline_of(named_on_the_command_line(["droppeft", "fedlora"], []).study()) == "fedlora"
    assert baseline_of(study_of()) == "full"


def test_a_target_is_a_variant_s_last_accuracy_on_the_same_seed_less_a_distance() -> None:
    """Means of the last three evaluations: 2 / 3 and 2.3 / 3."""
    target = Target(variant="full", minus=0.1)
    found = target_values(target, [*FULL, *DROPPED], ACCURACY)
    assert found == {0: pytest.approx(2.0 / 3 - 0.1), 1: pytest.approx(2.3 / 3 - 0.1)}
    assert target_values(None, FULL, ACCURACY) == {}
    number = Target(value=0.6)
    assert target_values(number, FULL, ACCURACY) == {0: 0.6, 1: 0.6}
    assert target_values(target, [lost(FULL[0]), FULL[1]], ACCURACY)[0] is None


def test_the_variant_that_sets_the_target_reaches_it_on_every_seed() -> None:
    chosen = comparison(target={"variant": "full", "minus": 0.01})
    [part] = summary(chosen.study(), [*FULL, *DROPPED])
    assert [row.reached for row in part.rows] == [2, 0]
    assert part.target == pytest.approx((2.0 + 2.3) / 6 - 0.01)


def test_references_are_means_over_seeds_where_all_variants_agree() -> None:
    known = {
        0: {"majority_accuracy": 0.25, "own_majority_accuracy": 0.5},
        1: {"majority_accuracy": 0.25, "own_majority_accuracy": 0.75},
    }
    runs = [with_result(run, **known[run.seed], tfidf_accuracy=None) for run in (*FULL, *DROPPED)]
    [part] = summary(study_of(), runs)
    assert (part.majority, part.tfidf, part.own_majority) == (0.25, None, 0.625)
    expected = "References: the most frequent class .250, each client's own most frequent class"
    assert expected in as_markdown([part])
    other_split = with_result(runs[-1], own_majority_accuracy=1)
    [part] = summary(study_of(), [*runs[:-1], other_split])
    assert (part.majority, part.own_majority) == (0.25, None)
    [part] = summary(study_of(), [*FULL, *DROPPED])
    assert "References" not in as_markdown([part])


def test_scores_of_generated_texts_stand_beside_those_of_the_model_before_training() -> None:
    before, after = {"rouge_l": 0.15, "chrf": 0.25}, {"rouge_l": 0.5, "chrf": 0.75}
    scores = {f"{name}_before": value for name, value in before.items()}
    scores |= {f"{name}_after": value for name, value in after.items()}
    runs = [
        with_result(
            a_loss(run),
            **{"global_loss": 1.5, "initial_loss": 3.25, "personalised_rouge_l": 0.375},
            **scores,
        )
        for run in (*FULL, *DROPPED)
    ]
    [part] = summary(study_of(), runs)
    text = as_markdown([part])
    assert "| variant | loss | ROUGE-L | whole run, modelled |" in text
    assert "| full | 1.500 ± 0.000 | .500 ± .000 |" in text
    assert "| variant | seeds | chrF | personalised ROUGE-L |" in text
    assert "| full | 2 | .750 ± .000 | .375 ± .000 |" in text
    assert "the model before training: loss 3.250, ROUGE-L .150, chrF .250." in text
    [part] = summary(study_of(), [*FULL, *DROPPED])
    assert part.untrained == {}
    assert "ROUGE-L" not in as_markdown([part])


def test_all_columns_of_a_language_model_are_shown_in_80_characters() -> None:
    """Every value is complete, although there are two seeds and two clients' scores."""
    values = {"global_loss": 1.5, "personalised_loss": 1.4375, "personalised_rouge_l": 0.375}
    own = {"personalised_worst_tenth": 1.6875, "personalised_deviation": 0.0625}
    runs = [
        with_result(a_loss(run), **values, **own, rouge_l_after=0.5, chrf_after=0.75)
        for run in (*FULL, *DROPPED)
    ]
    parts = summary(study_of(), runs)
    console = Console(width=80, record=True, file=io.StringIO())
    show(parts, console)
    shown = [
        line for line in console.export_text().splitlines() if re.match(r"\s*full\s{2,}", line)
    ]
    cells = [re.findall(r"\S+ ± \S+", line) for line in shown[:2]]
    assert cells == [
        [f"{loss} ± 0.000" for loss in ("1.500", "1.438", "1.688", "0.062")],
        [f"{score} ± .000" for score in (".500", ".750", ".375")],
    ]


def test_deviation_between_clients_and_clients_that_are_not_evaluated() -> None:
    """Deviations .1 and .3; two clients of one run could not be evaluated."""
    found = [
        with_result(one, personalised_deviation=deviation, unmeasured_clients=unmeasured)
        for one, deviation, unmeasured in zip(FULL, (0.1, 0.3), (0, 2), strict=True)
    ]
    [part] = summary(study_of(), [*found, *DROPPED])
    full, dropped = part.rows
    assert full.between_clients is not None
    assert full.between_clients.mean == pytest.approx(0.2)
    assert dropped.between_clients is None
    expected = "full: 2 clients of all runs could not be evaluated and are in no mean"
    assert failures(part) == [expected]
    assert expected in as_markdown([part])
    assert [row["between_clients"] for row in csv.DictReader(as_csv([part]).splitlines())] == [
        str(full.between_clients.mean),
        "",
    ]


def test_a_seed_that_failed_did_not_reach_the_target() -> None:
    [part] = summary(study_of(target={"value": 0.6}), [*FULL, DROPPED[0], lost(DROPPED[1])])
    dropped = part.rows[1]
    assert (dropped.seeds, dropped.reached) == (1, 1)
    assert dropped.time_to_target_modelled_s is None


def a_loss(run: RunRecord) -> RunRecord:
    """The same run with a loss of 2 less the accuracy of each evaluation, and no accuracy."""
    rows = [
        Row(
            {
                **row,
                "global_accuracy": None,
                "global_loss": 2.0 - row["global_accuracy"],
            }
        )
        for row in run.rows
    ]
    values = {"metric": "loss", "initial_loss": 1.9, "global_loss": rows[-1]["global_loss"]}
    without = dict.fromkeys(("global_accuracy", "global_f1", "initial_accuracy"))
    return replace(with_result(run, **without, **values), rows=rows)


def test_of_a_loss_less_is_better() -> None:
    """The same rounds reach the target as with an accuracy that grows by as much."""
    full, dropped = [a_loss(run) for run in FULL], [a_loss(run) for run in DROPPED]
    [part] = summary(study_of(target={"value": 1.4}), [*full, *dropped])
    assert (part.metric, part.target) == (LOSS, 1.4)
    first, second = part.rows
    assert first.quality is not None
    assert first.quality.mean == pytest.approx(1.25)
    assert first.f1 is None
    assert first.time_to_target_modelled_s is not None
    assert first.time_to_target_modelled_s.mean == 30.0
    assert (first.reached, second.speed_up_modelled) == (2, 2.0)
    # A target that is too low is not reached, however far above it the losses are.
    [part] = summary(study_of(target={"value": 0.5}), [*full, *dropped])
    assert [row.reached for row in part.rows] == [0, 0]


def test_a_target_that_is_a_variant_s_loss_is_worse_by_a_distance() -> None:
    runs = [a_loss(run) for run in FULL]
    found = target_values(Target(variant="full", minus=0.1), runs, LOSS)
    assert found == {0: pytest.approx(4 / 3 + 0.1), 1: pytest.approx(3.7 / 3 + 0.1)}
    chosen = comparison(target={"variant": "full", "minus": 0.01})
    [part] = summary(chosen.study(), [*runs, *map(a_loss, DROPPED)])
    assert [row.reached for row in part.rows] == [2, 0]


def test_a_target_of_another_metric_than_the_primary_one() -> None:
    runs = []
    for run in (*FULL, *DROPPED):
        rows = [Row({**row, "global_f1": row["global_accuracy"] / 2}) for row in run.rows]
        runs.append(replace(with_result(run, initial_f1=0.1), rows=rows))
    [part] = summary(study_of(target={"value": 0.3, "metric": "f1"}), runs)
    assert (part.metric, part.target_metric, part.target) == (ACCURACY, F1, 0.3)
    [by_accuracy] = summary(study_of(target={"value": 0.6}), runs)
    times = [row.time_to_target_modelled_s for row in part.rows]
    assert times == [row.time_to_target_modelled_s for row in by_accuracy.rows]
    assert "reaches the target (F1 .300) 2.0 times sooner" in answer(part)[0]
    with pytest.raises(
        DroppeftError, match=r"target\.metric='perplexity': task=classification has"
    ):
        cells(comparison(target={"value": 0.3, "metric": "perplexity"}))


def test_tables_name_the_metric() -> None:
    [part] = summary(study_of(), [*FULL, *DROPPED])
    assert "| variant | accuracy | F1 |" in as_markdown([part])
    [part] = summary(study_of(), [a_loss(run) for run in (*FULL, *DROPPED)])
    assert "| variant | loss | whole run, modelled |" in as_markdown([part])
    assert "| full | 1.250 ± 0.071 |" in as_markdown([part])
    [line, _] = csv.DictReader(as_csv([part]).splitlines())
    assert (line["metric"], float(line["quality"])) == ("loss", pytest.approx(1.25))


def test_a_stored_comparison_keeps_its_metric(tmp_path: Path) -> None:
    runs = [a_loss(run) for run in (*FULL, *DROPPED)]
    study = study_of(target={"value": 1.4})
    write_tables(tmp_path, study, runs)
    stored, records = read_tables(tmp_path)
    assert stored.target == study.target
    assert summary(stored, records) == summary(study, runs)


def test_a_target_that_no_model_can_reach_is_refused() -> None:
    expected = "target=86: accuracy is between 0 and 1; give a value in this range"
    with pytest.raises(DroppeftError, match=f"^{expected}$"):
        cells(comparison(target={"value": 86}))
    with pytest.raises(DroppeftError, match=expected):
        cells(named_on_the_command_line(["fedlora"], ["target=86"]))


# From the command line

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``droppeft`` with arguments, without its page: exit code, output, errors."""
    # Drawing its figures takes longer than the runs; report/test_page.py tests them.
    monkeypatch.setattr(
        "droppeft.report.comparison_page.write_page", lambda folder: folder / "report.html"
    )

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["droppeft", *arguments])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def test_compare_from_the_command_line_to_its_files(
    command: Command, tiny: Callable[..., Comparison], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [*tiny().settings, "dropout.mean=0.25"]
    target = [*tiny().settings, "target=0.1", "--seeds", "5"]
    _, shown, _ = command("compare", "fedlora", *target, "--out", str(tmp_path / "target"))
    assert "to target, modelled" in shown
    code, shown, _ = command(
        "compare", "fedlora", "droppeft", *arguments, "--seeds", "5", "--out", str(out)
    )
    assert code == 0
    assert "1/2 fedlora, seed 5" in shown
    assert "page: " in shown
    assert "References: the most frequent class ." in shown
    assert "1 run to go: about" in shown
    assert "to target" not in shown
    assert {STUDY, DEFINITION, RUNS, CSV, MARKDOWN} < {path.name for path in out.iterdir()}
    study, records = read_tables(out)
    [expected] = study.commands
    assert expected.startswith("droppeft compare fedlora droppeft ")
    assert [cell.folder for cell in cells(read_comparison(out / DEFINITION))] == [
        run.folder for run in records
    ]
    for run, name in zip(records, ("fedlora", "droppeft"), strict=True):
        rows = rows_of(out / run.folder / "rounds.jsonl")
        assert [row["coverage"] for row in run.rows] == [row["coverage"] for row in rows]
        assert (run.variant, run.seed) == (name, 5)
        assert f'method="{name}"' in run.settings
    with (out / CSV).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == ["fedlora", "droppeft"]
    assert records[0].result is not None
    assert float(lines[0]["quality"]) == records[0].result["global_accuracy"]
    assert (out / MARKDOWN).read_text().count("| fedlora | 1 |") == 1
    code, shown, _ = command(
        "compare", "fedlora", "droppeft", *arguments, "--seeds", "5", "--out", str(out)
    )
    assert (code, shown.count("done before")) == (0, 2)


def test_a_comparison_can_be_continued_from_its_tables_alone(
    tiny: Callable[..., Comparison], finished: tuple[Path, list[RunRecord]], tmp_path: Path
) -> None:
    first, second = tiny(seeds=[0], **ALONE), tiny(seeds=[0, 1], **ALONE)
    records = finished[1]
    write(tmp_path / "there", first.study(), records, summary(first.study(), records))
    progress = Silent()
    found = run_cells(cells(second), tmp_path / "there", progress)
    assert progress.run == [("full", 1)]
    for one, other in zip(found, records, strict=False):
        assert {*one.settings} == {*other.settings}
        assert replace(one, settings=()) == replace(other, settings=())
    arguments = [*first.settings, "quorum=2"]
    changed = Comparison.model_validate({**first.model_dump(), "settings": arguments})
    assert done(cells(changed), tmp_path / "there") == []


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Settings of a variant may depend on the data; a failed run has no columns."""
    notes = {"chosen": {"3": 1}, "labels": {"1": "half"}}
    noted = [Row({**row, "notes": notes, "coverage": [1, 2]}) for row in FULL[0].rows]
    runs = [
        lost(DROPPED[1]),
        replace(FULL[0], rows=noted, clients=[Row(client=3, rows=5, accuracy=0.4)]),
        replace(FULL[1], data="other", settings=("method=full", "rounds=9")),
        DROPPED[0],
    ]
    study = study_of(target={"variant": "full"}, baseline="dropped")
    write(tmp_path, study, runs, summary(study, runs))
    stored, found = read_tables(tmp_path)
    assert stored == study
    for one, other in zip(found, runs, strict=True):
        known = [{name: v for name, v in row.items() if v is not None} for row in one.rows]
        assert known == [{n: v for n, v in row.items() if v is not None} for row in other.rows]
        assert sorted(one.settings) == sorted(other.settings)
        assert one.result == other.result
        assert one.clients == other.clients
        assert (one.place, one.failure) == (other.place, other.failure)
    assert found[1].result is not None
    assert found[1].result["a column that the file lacks"] is None


def test_a_damaged_file_is_reported_and_left(
    tiny: Callable[..., Comparison], tmp_path: Path
) -> None:
    (tmp_path / STUDY).write_text('{"runs": [')
    with pytest.raises(DroppeftError, match=r"study\.json or a table beside it is damaged"):
        run_cells(cells(tiny(seeds=[0])), tmp_path, Silent())
    assert [path.name for path in tmp_path.iterdir()] == [STUDY]


@pytest.mark.full
def test_seeds_of_a_file_may_be_run_by_separate_calls(
    command: Command, tiny: Callable[..., Comparison], tmp_path: Path
) -> None:
    file, out = tmp_path / "pair.toml", tmp_path / "out"
    settings = ", ".join(f'"{setting}"' for setting in tiny().settings)
    file.write_text(
        f'settings = [{settings}]\nseeds = [5, 6]\n[variants]\nfull = ["method=fedlora"]\n'
    )
    for seed, finished in (("6", [6]), ("5", [5, 6])):
        code, shown, _ = command("compare", str(file), "--seeds", seed, "--out", str(out))
        assert code == 0
        assert f"1/1 full, seed {seed}" in shown
        assert [run.seed for run in read_tables(out)[1]] == finished
    study = read_tables(out)[0]
    assert study.definition == file.read_text()
    assert ["--seeds 6" in command for command in study.commands] == [True, False]
    code, shown, _ = command("compare", str(file), "--out", str(out))
    assert (code, shown.count("done before")) == (0, 2)
    code, _, errors = command("compare", str(file), "--seeds", "5,7", "--out", str(out))
    assert code == USER_ERROR
    assert f"--seeds 5,7: {file} has only the seeds 5,6" in errors


def test_a_comparison_whose_runs_all_failed_writes_the_reasons(
    command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    code, shown, _ = command(
        "compare", "fedadapter", "training.max_length=9999", "--seeds", "0", "--out", str(out)
    )
    assert code == FAILED
    assert "fedadapter failed: " in shown
    assert "training.max_length=9999 is more than" in shown
    assert "fedadapter failed" in (out / MARKDOWN).read_text()


def test_names_are_not_taken_for_markup(
    command: Command, tiny: Callable[..., Comparison], tmp_path: Path
) -> None:
    import tomli_w

    tree = {"variants": {"a [/2]": ["training.max_length=9999"]}, "seeds": [0]}
    (tmp_path / "c.toml").write_text(tomli_w.dumps(tree))
    _, shown, _ = command("compare", str(tmp_path / "c.toml"), "--out", str(tmp_path / "out"))
    assert shown.count("a [/2]") >= 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name one .toml file, or methods and settings"),
        (["a.toml", "b.toml"], "name one .toml file, or methods"),
        (["a.toml", "fedlora"], "name one .toml file, or methods"),
        (["nothing.toml"], "nothing.toml: no such configuration file"),
        (["fedlora", "fedfoo"], "method=fedfoo: unknown method"),
        (["fedlora", "source.text=body"], "source.text does not apply to data=builtin"),
        (["fedlora", "--seeds", "a"], "--seeds 'a': write whole numbers as 0,1,2"),
    ],
)
def test_a_mistake_in_compare_is_one_sentence(
    command: Command, arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    code, _, errors = command("compare", *arguments, "--out", str(tmp_path / "out"))
    assert code == USER_ERROR
    assert sentence in errors
    assert not (tmp_path / "out").exists()


STUDIES = sorted((Path(__file__).parents[2] / "benchmarks").glob(f"*/{DEFINITION}"))
RUNNABLE = [
    path
    for path in STUDIES
    if "is the last that can run this file" not in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.parent.name)
def test_the_studies_can_be_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, data_folder: Path
) -> None:
    monkeypatch.setenv("DROPPEFT_DATA", str(data_folder))
    monkeypatch.setenv("PRUNED_MPNET", str(data_folder / "deep12"))  # any model
    found = cells(read_comparison(path))
    others = {
        "adaptive_mpnet": {0, 1, 2, 3, 4},
        "adaptive_smollm2": {3, 4, 5, 6, 7},
        "depth": {0, 1},
        "contest_confirmation": {3, 4, 5},
        "contest_length": {7},
        "contest_rates_mpnet": {7},
        "contest_rates_smollm2": {7},
        "default_run_development": {7, 8},
        "own_data": {7},
        "ia3": {7, 8},
        "dropout_compressed": {0},
        "droppeft_mpnet": {0},
        "layer_dropout_smollm2": {0},
        "layer_modes_mpnet": {0},
        "layer_modes_smollm2": {0},
        "rates": {7},
        "sharing_smollm2": {0},
    }
    assert {cell.seed for cell in found} == others.get(path.parent.name, {0, 1, 2})
    for cell in found:
        data = resolve(cell.config, cuda=False).data
        assert data == "builtin" or Path(data).is_dir()
        assert not method_named(cell.config.method).adjust(cell.config).clock.deadline_s


NOT_RUN_YET = {"contest_mpnet", "contest_smollm2", "contest_rates_mpnet", "contest_rates_smollm2"}
"""Studies that are fixed before they are run (docs/decisions/0021-the-second-contest.md)."""


def test_every_study_has_results() -> None:
    assert len(STUDIES) > 20
    for path in STUDIES:
        if path.parent.name in NOT_RUN_YET:
            assert not path.with_suffix(".json").exists()  # otherwise take its name from the list
            continue
        study, records = read_tables(path.parent)
        assert study.definition == path.read_text(encoding="utf-8")
        if path in RUNNABLE:
            assert {*read_comparison(path).variants} == {*study.variants}
        assert all(one.result is not None and one.rows for one in records)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0.0, "0.0 kJ"), (12.0, "0.01 kJ"), (49.0, "0.05 kJ"), (1234567.0, "1,234.6 kJ")],
)
def test_small_values_are_not_shown_as_zero(value: float | None, expected: str) -> None:
    row: Any = SimpleNamespace(energy_modelled_j=value)
    assert COLUMNS["energy, modelled"](row) == expected
