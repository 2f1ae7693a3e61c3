"""Tables about speed: steps and their limit, Trainers, workers, start, Flower's example."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.pages.markdown import markdown_table, megabytes
from benchmarks.study import read_table, read_values, was_measured

NAME = "speed"
OWN_RECIPE = "droppeft, its own recipe, 1 round"
NOT_MEASURED = "Not measured yet.\n"

Row = Mapping[str, Any]


def step_limits() -> str:
    """A training step, and its products and attention alone."""
    limit, lines = "products and attention alone", []
    for model, rows in _by(_rows("step_limit"), "model").items():
        arms = _by(rows, "variant")
        for arm, found in arms.items():
            if arm != limit:
                steps = found[0]["steps"]
                lines.append(
                    (
                        f"{model}, {arm}",
                        f"{_middle(found, 'wall_s') / steps:.3f} s",
                        f"{_middle(arms[limit], 'wall_s') / steps:.3f} s",
                        f"{found[0]['flops'] / _middle(arms[limit], 'wall_s') / 1e9:.0f}",
                        _ratio(found, arms[limit], "wall_s"),
                        _ratio(found, arms[limit], "cpu_s"),
                    )
                )
    heads = (
        *("model", "step", "products and attention", "GFLOP/s of these"),
        *("step, of these", "the same in CPU time"),
    )
    return _table(heads, lines)


def trainers() -> str:
    """A local training by Trainers and by droppeft: time of a step, ratios and losses."""
    lines = []
    for model, rows in _by(_rows("trainer"), "model").items():
        arms = _by(rows, "variant")
        for arm, found in arms.items():
            steps = found[0]["steps"]
            lines.append(
                (
                    f"{model}: {arm}",
                    f"{_middle(found, 'wall_s') / steps:.3f} s",
                    f"{_middle(found, 'cpu_s') / steps:.3f} s",
                    _ratio(found, arms["droppeft"], "wall_s"),
                    _ratio(found, arms["droppeft"], "cpu_s"),
                    f"{_middle(found, 'train_loss'):.3f}",
                    f"{found[0]['test_loss']:.3f}",
                )
            )
    heads = (
        *("training", "step", "CPU time", "of droppeft's time", "of its CPU time"),
        *("training loss", "test loss"),
    )
    return _table(heads, lines)


def worker_throughput() -> str:
    """Rows per second of a round with one and two workers, and beside other work."""
    arms, lines = _by(_rows("workers"), "variant"), []
    if not arms:
        return NOT_MEASURED
    fair = read_values(NAME)["workers"]["settings"]["fair_share"]
    one, two, beside = arms.values()
    for arm, found in arms.items():
        fair_now = f"{_ratio(beside, two, 'row_s', fair)}" if found is beside else "–"
        lines.append(
            (
                arm,
                f"{1 / _middle(found, 'row_s'):.0f}",
                _ratio(one, found, "row_s"),
                fair_now,
                f"{_middle(found, 'wall_s'):.0f} s",
                *(
                    f"{100 * _middle(found, f'{share}_share'):.1f} %"
                    for share in ("evaluation", "merging", "saving")
                ),
            )
        )
    heads = (
        *("", "rows per second", "of one worker's", "time, of the fair share's", "command"),
        *("evaluation", "merging", "saving"),
    )
    return _table(heads, lines)


def start_up_times() -> str:
    """Seconds until commands have started."""
    lines = [
        (arm, f"{_middle(found, 'seconds'):.2f} s ({_ends(found, 'seconds')})")
        for arm, found in _by(_rows("start_up"), "variant").items()
    ]
    return _table(("", "seconds (lowest–highest)"), lines)


def flower_llm_example() -> str:
    """Flower's example of a language model and the same federation in droppeft."""
    arms, lines = _by(_rows("flower_example"), "variant"), []
    ours, own_recipe = arms.get("droppeft", []), arms.get(OWN_RECIPE, [])
    rounds = _counted(read_values(NAME)["flower_example"]["settings"]["rounds"]) if arms else ""
    for arm, found in arms.items():
        measured = found[0]["wall_s"] is not None
        lines.append(
            (
                f"{arm}, {rounds}" if measured and not arm.endswith("round") else arm,
                *(
                    (
                        f"{_middle(found, 'wall_s'):.0f} s",
                        f"{_middle(found, 'cpu_s'):.0f} s",
                        _ratio(found, ours, "wall_s"),
                        _ratio(found, own_recipe, "wall_s"),
                        megabytes(_middle(found, "peak_bytes")),
                        _ratio(found, ours, "peak_bytes"),
                    )
                    if measured
                    else ("–",) * 6
                ),
                f"{_middle(found, 'test_loss'):.3f}",
            )
        )
    heads = (
        *("", "command", "CPU time", "of droppeft's time", "of one round with its own recipe"),
        *("memory", "of droppeft's memory", "test loss"),
    )
    return _table(heads, lines)


def make_run_times() -> str:
    """The whole of `make run`, before and now."""
    lines = [
        (
            arm,
            f"{_middle(found, 'wall_s'):.0f} s ({_ends(found, 'wall_s', 0)})",
            f"{_middle(found, 'cpu_s'):.0f} s",
            megabytes(_middle(found, "peak_bytes")),
            f"{_middle(found, 'accuracy'):.3f}",
        )
        for arm, found in _by(_rows("make_run"), "variant").items()
    ]
    return _table(("", "command (lowest–highest)", "CPU time", "memory", "accuracy"), lines)


def float32_precision() -> str:
    """What fewer bits in fp32 products bring."""
    arms, lines = _by(_rows("torch_options"), "variant"), []
    for arm, found in arms.items():
        kind = arm.partition(":")[0]
        if (first := arms.get(f"{kind}: fp32")) is not None:
            loss = found[0]["train_loss"]
            lines.append(
                (arm, _ratio(first, found, "wall_s"), "–" if loss is None else f"{loss:.4f}")
            )
    return _table(("", "times as fast as fp32", "training loss"), lines)


def waiting_threads() -> str:
    """Products per second of a process, by its threads and by how they wait."""
    arms, lines = _by(_rows("torch_options"), "variant"), []
    for arm, found in arms.items():
        name, _, place = arm.rpartition(", ")
        if (first := arms.get(f"1 thread, {place}")) is not None:
            lines.append(
                (
                    name,
                    place,
                    f"{_middle(found, 'iterations_per_s'):,.0f}",
                    _ratio(found, first, "iterations_per_s"),
                )
            )
    return _table(("", "where", "iterations per second", "of one thread's"), lines)


def _counted(rounds: int) -> str:
    return f"{rounds} round{'s' * (rounds > 1)}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return markdown_table(heads, lines) if lines else NOT_MEASURED


def _rows(part: str) -> list[dict[str, Any]]:
    measured = was_measured(NAME) and part in read_values(NAME)
    return read_table(NAME, part) if measured else []


def _by(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found


def _middle(rows: Sequence[Row], column: str) -> float:
    return float(median(row[column] for row in rows))


def _ends(rows: Sequence[Row], column: str, places: int = 2) -> str:
    values = [row[column] for row in rows]
    return f"{min(values):.{places}f}–{max(values):.{places}f}"


def _ratio(rows: Sequence[Row], others: Sequence[Row], column: str, by: float = 1.0) -> str:
    """Median of the ratios of repeats that alternated, with the lowest and the highest."""
    known = {row["repeat"]: row[column] for row in others}
    found = [row[column] / known[row["repeat"]] / by for row in rows if row["repeat"] in known]
    if not found:
        return "–"
    if rows is others or len(found) == 1:
        return f"{median(found):.2f}"
    return f"{median(found):.2f} ({min(found):.2f}–{max(found):.2f})"
