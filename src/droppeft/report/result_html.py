"""A finished run as a small HTML table for notebooks, in the colours of the notebook. Ours."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from droppeft.quantities import bytes_text, counted, seconds_text, share
from droppeft.report.opening import BUILT_IN
from droppeft.runs.ledger import RoundRow
from droppeft.tasks.metrics import TEXT_METRICS, Metric, primary_metric

WIDTH, HEIGHT, EDGE = 180, 40, 4  # of the curve, in pixels

CELL = "padding:.15em 1.2em .15em 0;text-align:left;vertical-align:top;border:0;background:none"
TABLE = "border-collapse:collapse;margin:.3em 0;color:inherit;font-size:inherit"
SOFT = "opacity:.65"


def result_html(result: Mapping[str, Any], rows: Sequence[RoundRow], folder: Path) -> str:
    """Return a table with quality, references and cost, and a curve of the quality by round.

    Args:
        result: content of ``result.json``.
        rows: of all rounds.
        folder: of the run.
    """
    metric = primary_metric(result)
    lines = "".join(
        f'<tr style="background:none"><td style="{CELL};{SOFT}">{escape(name)}</td>'
        f'<td style="{CELL};text-align:right;font-weight:600">{escape(value)}</td>'
        f'<td style="{CELL};{SOFT}">{escape(note)}</td></tr>'
        for name, value, note in _lines(result, metric)
    )
    data = short_name(result["data"])
    title = f"{result['method']} · {data} · {counted(result['rounds'], 'round')}"
    return (
        '<div style="color:inherit;font-variant-numeric:tabular-nums;line-height:1.4">'
        f"<div><b>droppeft</b> · {escape(title)}</div>"
        '<div style="display:flex;flex-wrap:wrap;align-items:center;gap:.3em 1.5em">'
        f'<table style="{TABLE}">{lines}</table>'
        f"{_curve(rows, metric)}</div>"
        f'<div style="max-width:46em">{_sentences(result)}</div>'
        f'<div style="{SOFT};font-size:.9em">{escape(str(folder))}</div></div>'
    )


def _lines(result: Mapping[str, Any], metric: Metric) -> Iterator[tuple[str, str, str]]:
    """What, its value, and a note."""
    value = result[metric.key("global")]
    if value is not None:
        yield metric.label, metric.text(value), f"global model, {result['test_rows']:,} test texts"
    own = result[metric.key("personalised")]
    if own is not None:
        note = f"mean of {result['personalised_clients']:,} clients' own models"
        yield f"personalised {metric.label}", metric.text(own), note
    texts = result.get("generated", {})
    for name, score in TEXT_METRICS.items():
        if texts and texts["after"][name]:
            note = f"before training {share(texts['before'][name])}"
            yield score.label, share(texts["after"][name]), note
    yield "before training", metric.text(result[metric.key("initial")]), ""
    if "majority_accuracy" in result:
        yield "most frequent class", share(result["majority_accuracy"]), "reference"
        yield "TF-IDF + linear SVM", share(result["tfidf_accuracy"]), "all texts in one place"
    traffic = bytes_text(result["upload_bytes"] + result["download_bytes"])
    yield "time", seconds_text(result["host_wall_s"]), f"all clients' traffic {traffic}"


def _curve(rows: Sequence[RoundRow], metric: Metric) -> str:
    """An SVG line of the quality by round; nothing if there are fewer than two values."""
    key = metric.key("global")
    points = [(row.round, value) for row in rows if (value := row.quality[key]) is not None]
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    low, high = (edge(value for _, value in points) for edge in (min, max))
    across = (WIDTH - 2 * EDGE) / (last - first)
    up = (HEIGHT - 2 * EDGE) / ((high - low) or 1)
    places = [
        (EDGE + across * (round - first), HEIGHT - EDGE - up * (value - low))
        for round, value in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    ends = f"{metric.label} from {metric.text(points[0][1])} to {metric.text(points[-1][1])}"
    return (
        f'<figure style="margin:0"><svg width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(ends)}"><polyline points="{line}" fill="none" '
        'stroke="currentColor" stroke-width="1.6" stroke-linejoin="round"/>'
        f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="3" fill="currentColor"/>'
        f'</svg><figcaption style="font-size:.85em;{SOFT}">{escape(metric.label)} by round: '
        f"{metric.text(points[0][1])} to {metric.text(points[-1][1])}</figcaption></figure>"
    )


def _sentences(result: Mapping[str, Any]) -> str:
    return "".join(
        f'<p style="margin:.2em 0">{escape(sentence)}</p>' for sentence in result["conclusion"]
    )


def short_name(data: str) -> str:
    """Return the name of a data set or model, without the folders of an absolute path."""
    path = Path(data)
    return BUILT_IN.get(data, path.name if path.is_absolute() else data)
