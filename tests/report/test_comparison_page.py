"""The page about a comparison: complete, self-contained, reproducible."""

import re
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from droppeft.comparison.answer import answer
from droppeft.comparison.grid import Comparison, cells
from droppeft.comparison.runner import run_cells
from droppeft.comparison.study_files import Row, RunRecord, read_tables, write_tables
from droppeft.comparison.summary import summary
from droppeft.comparison.writers import COLUMNS, TEXTS, as_markdown, main_columns, write
from droppeft.report.comparison_page import FIGURES, PAGE, read_folder, write_page
from droppeft.report.drawing import INK, svg
from droppeft.report.figures import (
    AXES,
    BARS,
    EACH,
    NAMED,
    OVER_ROUNDS,
    TWO,
    curve_points,
    figures,
    main_figure,
)
from droppeft.report.layers import of_layers
from droppeft.tasks.metrics import LOSS
from page_reader import Reader, check_self_contained
from runs import Recorder

CONFIGURATOR = ("rates-2", "arms-2", "trained-2")
"""Figures of the third variant, which has a configurator. One of its arms trains the upper half."""

COVERED = tuple(f"{name}-{variant}" for name in ("coverage", "importance") for variant in (1, 2, 3))
"""Figures of variants whose clients do not send every layer: in two steps some layers never run,
and the last variant shares nothing."""


class Silent:
    """A progress listener that prints nothing."""

    def begins(self, cell: Any, number: int, of: int) -> Any:
        return Recorder()

    def done(self, record: RunRecord, wall_s: float | None) -> None:
        pass


@pytest.fixture(scope="module")
def compared(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variants that ran, one with a name that looks like markup, and one that failed.

    Each ran with one seed, and its files are also those of the other.
    """
    out = tmp_path_factory.mktemp("compared") / "a & b"
    common = [setting for setting in tiny_overrides if not setting.startswith("dropout.")]
    chosen = Comparison.model_validate(
        {
            "settings": [*common, "rounds=4"],
            "variants": {
                "full": ["method=fedlora"],
                "<b>dropped</b>": ["dropout.mean=0.25"],
                "bandit": [
                    "configurator.policy=budgeted_thompson",
                    "dropout.protect_first=0",
                ],
                "alone": ["method=local"],
                "wrong": ["method=fedlora", "frozen.layers=4"],
            },
            "seeds": [0, 1],
            "target": {"value": 0.02},
        }
    )
    chosen_cells = [cell for cell in cells(chosen) if cell.seed == 0]
    ran = run_cells(chosen_cells, out, Silent())
    records = [
        replace(one, seed=seed, folder=f"{one.folder}-{seed}") for seed in (0, 1) for one in ran
    ]
    write(out, chosen.study(), records, summary(chosen.study(), records))
    write_page(out)
    return out


def test_the_page_is_self_contained(compared: Path) -> None:
    check_self_contained((compared / PAGE).read_text(encoding="utf-8"))


def test_the_page_shows_every_variant_figure_and_failure(compared: Path) -> None:
    text = (compared / PAGE).read_text(encoding="utf-8")
    reader = Reader(text)
    of_all = len(AXES) + len(BARS) + len((EACH, TWO))
    assert reader.tags.count("svg") == of_all + len(CONFIGURATOR) + len(COVERED)
    assert "bandit: drop rate of each layer" in reader.texts
    assert any("all layers" in part or "of the layers" in part for part in reader.texts)
    heads = ["accuracy" if name == "quality" else name for name in COLUMNS]
    heads = [name for name in heads if name not in TEXTS[1:]]  # no texts are generated
    assert [name for name in heads if name not in reader.texts] == []
    for variant in ("full", "<b>dropped</b>", "alone", "wrong"):
        # In the table, in every bar chart, and beside each curve if it has a global model.
        least = 1 + len(BARS) + (len(AXES) if variant not in ("alone", "wrong") else 0)
        assert reader.texts.count(variant) >= least, variant
    assert "b" not in reader.tags
    assert any("wrong failed: frozen.layers=4 leaves none" in part for part in reader.texts)
    assert any(part.endswith("folder a & b") for part in reader.texts)


def test_the_page_names_data_model_and_settings(compared: Path) -> None:
    reader = Reader((compared / PAGE).read_text(encoding="utf-8"))
    common = next(text for text in reader.texts if "\ncohort_size = " in text)
    [first, *_] = read_tables(compared)[1]
    places = [f'model = "{first.model}"', f'data = "{first.data}"']
    assert common.splitlines()[:3] == [*places, "seed = 0, 1"]
    assert tomllib.loads(common.replace("seed = 0, 1", ""))["evaluation"]["personalised"] is True


@pytest.mark.full
def test_without_a_target_nothing_is_said_about_one(compared: Path, tmp_path: Path) -> None:
    study, records = read_tables(compared)
    write_tables(tmp_path, replace(study, target=None), records)
    for folder, said in ((compared, True), (tmp_path, False)):
        text = write_page(folder).read_text(encoding="utf-8")
        assert bool(re.search(r"\btarget\b", text)) is said


def test_arms_are_drawn_when_they_were_chosen(compared: Path) -> None:
    """A round's share is a mean over it and the rounds before it, not over later ones."""
    records = read_folder(compared)[1]
    rows = next(one.rows for one in records if one.variant == "bandit")
    labels = {"0": "early", "1": "late"}
    given = [("0", 1), ("0", 2), ("1", 3), ("1", 4)]
    runs = [
        {
            **rows[0],
            "round": round,
            "notes": {"chosen": {"5": arm}, "labels": labels, "rates": [0.0]},
        }
        for arm, round in given
    ]
    [axis] = of_layers(0, "bandit", [runs])["arms-0"].axes
    late = axis.collections[1].get_paths()[0].vertices
    assert {float(up) for across, up in late if across == 2} == {1.0}
    assert min(up for across, up in late if across == 3) == pytest.approx(2 / 3)


@pytest.mark.full
def test_a_page_holds_for_a_hundred_runs(compared: Path, tmp_path: Path) -> None:
    """Twenty variants with five seeds: each is named, and the page is a few megabytes large."""
    study, records = read_tables(compared)
    every = [
        replace(
            one,
            folder=f"{one.folder} {number} {seed}",
            variant=f"{one.variant} {number}",
            seed=seed,
        )
        for number in range(5)
        for one in records
        for seed in range(5)
        if one.seed == 0 and one.result
    ]
    assert len(every) == 100
    variants = tuple(dict.fromkeys(one.variant for one in every))
    write_tables(tmp_path, replace(study, variants=variants, seeds=tuple(range(5))), every)
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert ": 20 variants compared<" in text
    assert "5 seeds · folder" in text
    reader = Reader(text)
    assert f"The baseline and the {NAMED - 1} others that end best have names." in text
    assert {*variants} <= {*reader.texts}
    # Figures of single variants are folded away, and the page stays small.
    assert "<summary>Trained layers</summary>" in text
    assert len(text) < 5e6


def test_figures_take_the_page_s_text_colour(compared: Path) -> None:
    """They can be read in the dark colour scheme."""
    text = (compared / PAGE).read_text(encoding="utf-8")
    assert INK not in text
    assert text.count("currentColor") > 100
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_figures_are_files_too(compared: Path) -> None:
    names = {path.name for path in (compared / FIGURES).iterdir()}
    every = (*AXES, *BARS, EACH, TWO, *CONFIGURATOR, *COVERED)
    assert names == {f"{name}.{kind}" for name in every for kind in ("png", "svg")}
    for path in (compared / FIGURES).glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")
    for path in (compared / FIGURES).glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_among_many_variants_the_baseline_and_the_best_have_names(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, records = read_folder(compared)
    [part] = summary(study, records)
    ends = {
        row.variant: fmean(
            one.rows[-1]["global_accuracy"] for one in records if one.variant == row.variant
        )
        for row in part.rows
        if row.quality
    }
    monkeypatch.setattr("droppeft.report.figures.NAMED", 2)
    drawn = svg(figures(part, records)["quality-traffic"])
    named = {text for text in Reader(drawn).texts if text in ends}
    [best] = named - {part.baseline}
    assert part.baseline in named
    assert ends[best] == max(ends[variant] for variant in ends.keys() - {part.baseline})


def of_loss(run: RunRecord) -> RunRecord:
    """The same run with its loss as the primary metric, and no accuracy."""
    result = run.result and Row({**run.result, "metric": "loss", "global_accuracy": None})
    clients = [Row(client=one["client"], rows=one["rows"], loss=1.5) for one in run.clients]
    return replace(run, result=result, clients=clients)


def test_figures_and_tables_of_a_loss(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named after it, and the best curve is the one that ends lowest."""
    study, before = read_folder(compared)
    records = [of_loss(one) for one in before]
    [part] = summary(replace(study, target=None), records)
    assert "| variant | loss |" in as_markdown([part])
    drawn = figures(part, records)
    [axis] = drawn["quality-traffic"].axes
    assert axis.get_ylabel() == "loss"
    points = curve_points(records[0].rows, AXES["quality-traffic"], LOSS)
    assert [value for _, value in points] == [row["global_loss"] for row in records[0].rows]
    assert "loss of a client's own model" in Reader(svg(drawn[EACH])).texts
    ends = {
        row.variant: fmean(
            one.rows[-1]["global_loss"] for one in records if one.variant == row.variant
        )
        for row in part.rows
        if row.quality
    }
    monkeypatch.setattr("droppeft.report.figures.NAMED", 2)
    shown = {*Reader(svg(figures(part, records)["quality-traffic"])).texts}
    best = min(ends.keys() - {part.baseline}, key=lambda one: ends[one])
    assert shown & ends.keys() == {part.baseline, best}
    assert len(set(ends.values())) > 1


def test_bands_are_drawn_where_they_do_not_hide_one_another(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, records = read_folder(compared)
    [part] = summary(study, records)
    curves = sum(1 for row in part.rows if row.quality)

    def bands() -> int:
        [axis] = figures(part, records)["quality-traffic"].axes
        return len(axis.collections)

    assert bands() == curves > 1
    monkeypatch.setattr("droppeft.report.figures.BANDS", curves - 1)
    assert bands() == 0


def test_rates_of_a_variant_that_drops_nothing_are_not_drawn(compared: Path) -> None:
    records = read_folder(compared)[1]
    rounds = [one.rows for one in records if one.variant == "bandit"]
    assert {"rates-0", "arms-0"} <= of_layers(0, "bandit", rounds).keys()
    undropped = [[{**row, "notes": _undropped(row["notes"])} for row in rows] for rows in rounds]
    assert "rates-0" not in (drawn := of_layers(0, "bandit", undropped))
    assert "arms-0" in drawn


def _undropped(notes: dict[str, Any]) -> dict[str, Any]:
    return {**notes, "rates": [0.0] * len(notes["rates"])} if notes else notes


@pytest.mark.full
def test_a_page_is_the_same_when_written_again(compared: Path) -> None:
    before = (compared / PAGE).read_bytes()
    write_page(compared)
    assert (compared / PAGE).read_bytes() == before


def test_the_page_begins_with_the_answer_a_table_and_a_figure(compared: Path) -> None:
    text = (compared / PAGE).read_text(encoding="utf-8")
    study, records = read_folder(compared)
    [part] = summary(study, records)
    shown = {*Reader(text).texts}
    assert {*answer(part)} <= shown
    places = [text.index(mark) for mark in ('class="answer"', "<table", "<svg", "<details")]
    assert places == sorted(places)
    assert text[: places[-1]].count("<table") == text[: places[-1]].count("<svg") == 1
    assert len(main_columns(part)) <= 8
    assert " ".join(answer(part)) in as_markdown([part])


def test_variants_that_take_the_same_time_are_shown_over_rounds(compared: Path) -> None:
    study, records = read_folder(compared)
    [part] = summary(study, records)
    assert main_figure(part, records) == "quality-modelled-time"
    same = [one for one in records if one.variant == "full"]
    assert main_figure(part, same) == OVER_ROUNDS


def test_without_a_global_model_there_are_no_curves(compared: Path) -> None:
    study, records = read_folder(compared)
    alone = replace(study, variants=("alone",))
    [part] = summary(alone, [one for one in records if one.variant == "alone"])
    drawn = figures(part, [one for one in records if one.variant == "alone"])
    assert EACH in drawn
    assert not drawn.keys() & AXES.keys()


def test_a_comparison_whose_runs_all_failed_has_a_page(compared: Path, tmp_path: Path) -> None:
    study, records = read_tables(compared)
    lost = [replace(one, result=None, rows=[], clients=[], failure="lost") for one in records]
    write_tables(tmp_path, study, lost)
    reader = Reader(write_page(tmp_path).read_text(encoding="utf-8"))
    assert any("full failed: lost" in part for part in reader.texts)
