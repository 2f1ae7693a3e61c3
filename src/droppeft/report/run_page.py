"""Write the page of a run: what it has shown, in one HTML file without scripts. Ours.

The page is made from the files in the run's folder. It loads nothing and follows the light or dark
colour scheme of the browser. Without matplotlib it has no figures, and says so.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from droppeft.config import flat
from droppeft.errors import DroppeftError
from droppeft.extras import missing_packages
from droppeft.files import write_atomically
from droppeft.quantities import bytes_text, counted, seconds_text, share
from droppeft.report.calibration_figure import CAPTION, figure_of_result
from droppeft.report.client_activity import (
    NAMED,
    by_client,
    by_device,
    left_out,
    participation,
    spread,
    totals_by_client,
)
from droppeft.report.closing import as_word, given_settings, which_f1
from droppeft.report.confusion_table import confusion_table
from droppeft.report.drawing import inline, style, svg
from droppeft.report.layers import of_layers
from droppeft.report.opening import BUILT_IN, facts
from droppeft.report.result_html import short_name
from droppeft.report.run_costs import costs, rounds_table, times_chosen
from droppeft.report.run_figures import run_figures
from droppeft.runs.folder import (
    CLIENTS,
    CONFIG,
    GENERATED,
    MISTAKES,
    PAGE,
    RESULT,
    ROUNDS,
    read_result,
)
from droppeft.runs.ledger import RoundRow
from droppeft.runs.read_ledger import read_rounds, read_rows
from droppeft.tasks.metrics import LOSS, TEXT_METRICS, Metric, metrics_in, primary_metric

SAMPLE = ("prompt", "reference", "before", "after")
"""What ``generated.jsonl`` has of each sample."""

MISTAKE = ("text", "true", "predicted", "probability")
"""What ``mistakes.jsonl`` has of each mistake, beside the second text of a pair."""

SHOWN_SAMPLES = 3
"""Samples of generated texts that are shown; the others are folded away."""

TEMPLATE = Environment(
    loader=PackageLoader("droppeft", "report"), autoescape=True, undefined=StrictUndefined
).get_template("run.html")


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a finished run and return its path.

    Raises:
        DroppeftError: the folder holds no finished run, or a file in it is damaged.
    """
    check_finished(folder)
    result, rows = read_result(folder), read_rounds(folder / ROUNDS)
    metric = primary_metric(result)
    text = TEMPLATE.render(
        title=f"{result['method']} on {_named(result['data'], 'built-in texts')}",
        subtitle=_subtitle(result),
        headline=_headline(result, metric),
        sentences=result["conclusion"],
        tiles=list(_tiles(result, metric)),
        no_figures=bool(missing_packages("report")),
        **_figures(result, rows),
        by_round_caption=_caption(result),
        confusion=confusion_table(result),
        mistakes=_lines(folder / MISTAKES, MISTAKE) if _keeps_mistakes(result) else None,
        generated=_generated(folder, result),
        clients=_clients(folder, result, rows),
        arms=times_chosen(rows),
        costs=costs(result),
        no_clock=result["no_clock_reason"],
        rounds=rounds_table(rows, metric),
        facts=list(facts({**result, **NOT_KNOWN}, None)),
        lists=_lists(result),
        folder=folder.resolve().name,
    )
    write_atomically(folder / PAGE, text.encode())
    return folder / PAGE


NOT_KNOWN = {"workers": 1, "why_fewer_workers": None, "expected_wall_s": None}
"""What is only known while a run is going on."""


def check_finished(folder: Path) -> None:
    """Check that a folder holds a finished run.

    Raises:
        DroppeftError: it does not.
    """
    if (folder / RESULT).is_file():
        return
    if (folder / CONFIG).is_file():
        raise DroppeftError(
            f"{folder}: this run is not finished; go on with: droppeft resume {folder}"
        )
    raise DroppeftError(f"{folder}: holds no finished run (no {RESULT}) and no comparison")


def _named(name: str, built_in: str) -> str:
    """The name of data or of a model, without the folders of an absolute path."""
    return built_in if name in BUILT_IN else short_name(name)


def _subtitle(result: Mapping[str, Any]) -> str:
    return " · ".join(
        (
            f"model {_named(result['model'], 'all-MiniLM-L6-v2')}",
            counted(result["clients"], "client"),
            counted(result["rounds"], "round"),
            f"seed {result['seed']}",
        )
    )


def _headline(result: Mapping[str, Any], metric: Metric) -> tuple[str, str]:
    """The primary metric of the global model, or else of the clients' models, and what it is."""
    name = "loss per token" if metric == LOSS else metric.label
    value, own = (result[metric.key(whose)] for whose in ("global", "personalised"))
    if value is not None and result[LOSS.key("global")] is not None:
        texts = counted(result["test_rows"], "test text")
        return _text(metric, value), f"{name} of the global model on {texts}"
    if own is not None:
        clients = counted(result["personalised_clients"], "client")
        return (
            _text(metric, own),
            f"{name} of the clients' own models on their own test texts, mean of {clients}",
        )
    return "–", "the run has no model with finite values"


def _text(metric: Metric, value: float) -> str:
    """A value with its unit."""
    return f"{metric.in_percent(value)}{' nats' if metric == LOSS else ''}"


def _tiles(result: Mapping[str, Any], metric: Metric) -> Iterator[tuple[str, str, str]]:
    """Name, value and note of what else is worth seeing at once."""
    sample = f"on {counted(result['sampled_test_rows'], 'test text')}"
    yield "before training", _text(metric, result[metric.key("initial")]), sample
    if "majority_accuracy" in result:
        yield "most frequent class", metric.in_percent(result["majority_accuracy"]), "always named"
    if result.get("tfidf_accuracy") is not None:
        note = "all texts in one place"
        yield "TF-IDF + linear SVM", metric.in_percent(result["tfidf_accuracy"]), note
    for other in metrics_in(result):
        if other not in (metric, LOSS) and result[other.key("global")] is not None:
            note = which_f1(other, result) or "global model"
            yield other.label, other.in_percent(result[other.key("global")]), note
    if result[metric.key("personalised")] is not None:
        worst = _text(metric, result["personalised_worst_tenth"])
        note = f"mean on their own test texts; worst tenth {worst}"
        yield "clients' models", _text(metric, result[metric.key("personalised")]), note
    if result["target"] is not None:
        reached = result["target_round"]
        value = "not reached" if reached is None else f"round {reached}"
        yield f"target {_text(metric, result['target'])}", value, "mean of three evaluations"
    if result["privacy"] is not None:
        note = f"differential privacy of each client, delta {result['privacy']['delta']:g}"
        yield "epsilon", f"{result['privacy']['epsilon']:.3g}", note
    rounds = counted(result["rounds"], "round")
    yield "time", seconds_text(result["host_wall_s"]), f"{rounds} on this machine (measured)"
    if result["round_modelled_s"] is not None:
        note = "on the clients' device profiles, side by side"
        yield "modelled time", seconds_text(result["round_modelled_s"]), note
    note = "stored for the backward pass of a step, at most"
    yield "memory", bytes_text(result["activation_bytes_peak"]), note
    up, down = result["upload_bytes"], result["download_bytes"]
    note = f"all clients: {bytes_text(up)} sent, {bytes_text(down)} received"
    yield "traffic", bytes_text(up + down), note


def _figures(result: Mapping[str, Any], rows: Sequence[RoundRow]) -> dict[str, Any]:
    """Figures as SVG elements: by round, of layers, and of what layers are worth."""
    made: dict[str, list[Any]] = {"by_round": [], "of_layers": [], "calibration": []}
    if not missing_packages("report"):
        made["by_round"] = run_figures(rows, result)
        with style():
            layers = of_layers(0, result["method"], [[row.as_columns() for row in rows]])
        made["of_layers"] = [*layers.values()]
        if result["calibration"] is not None:
            made["calibration"] = [figure_of_result(result["calibration"])]
    images = {name: [inline(svg(one)) for one in figures] for name, figures in made.items()}
    return {**images, "calibration_caption": CAPTION}


def _caption(result: Mapping[str, Any]) -> str:
    """What the figures by round show."""
    return (
        f"Test values are on the same {counted(result['sampled_test_rows'], 'test text')} in every "
        "round; round 0 is before training. A training loss is the mean over the steps of the "
        "round's clients."
    )


def _keeps_mistakes(result: Mapping[str, Any]) -> bool:
    return bool(result["config"]["evaluation"].get("mistakes")) and "confusion" in result


def _generated(folder: Path, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scores and samples of the texts that the model wrote; ``None`` if it wrote none."""
    found = result.get("generated")
    if found is None:
        return None
    scores = [
        (metric.label, share(found["before"][name]), share(found["after"][name]))
        for name, metric in TEXT_METRICS.items()
    ]
    samples = _lines(folder / GENERATED, SAMPLE) or found["samples"]
    return {
        "rows": found["rows"],
        "scores": scores,
        "shown": samples[:SHOWN_SAMPLES],
        "folded": samples[SHOWN_SAMPLES:],
    }


def _lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, which have these keys; a missing file has none.

    Raises:
        DroppeftError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        is_whole = all(row.keys() >= {*keys} for row in rows)
    except (OSError, ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise DroppeftError(f"{path}: is damaged; put the file back, or remove it")
    return rows


def _clients(folder: Path, result: Mapping[str, Any], rows: Sequence[RoundRow]) -> dict[str, Any]:
    """What the clients did, as sentences and tables."""
    metric = primary_metric(result)
    found = totals_by_client(read_rows(folder / CLIENTS), result)
    is_few = len(found) <= NAMED
    return {
        "sentence": participation(rows, found, result["clients"]),
        "tables": [
            (by_client(found, metric), "two") if is_few else (spread(found, metric), "wordy"),
            (by_device(found), ""),
        ],
        "left_out": left_out(rows),
        "unmeasured": _unmeasured(result["personalised_failures"]),
    }


def _unmeasured(failures: Sequence[Mapping[str, Any]]) -> str | None:
    """How many clients' models could not be measured, with one as an example."""
    if not failures:
        return None
    client, reason = failures[0]["client"], failures[0]["reason"]
    return (
        f"The models of {counted(len(failures), 'client')} could not be measured; for example, "
        f"client {client}: {reason}."
    )


def _lists(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Settings, versions and machine, each with a title."""
    given = [f"{key}={as_word(value)}" for key, value in given_settings(result)]
    every = [f"{key}={as_word(value)}" for key, value in flat(result["config"]).items()]
    machine = dict(result["machine"])
    machine["memory"] = bytes_text(machine.pop("memory_bytes"))
    return [
        ("Settings that differ from the defaults", given or ["none"]),
        ("All settings", every),
        ("Versions", [f"{name} {value}" for name, value in result["versions"].items()]),
        ("Machine", [f"{name}: {value}" for name, value in machine.items()]),
    ]
