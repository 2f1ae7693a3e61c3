"""Tables of recipes: learning rates, starts, ranks and targets of LoRA."""

from collections.abc import Sequence
from statistics import fmean

from benchmarks.pages.markdown import bare, markdown_table
from benchmarks.study import Row, read_table

NAMES = {"default": "Kaiming A, B = 0", "eva": "EVA", "pissa_niter_16": "PiSSA", "olora": "OLoRA"}


def recipes(model: str) -> str:
    """Test loss after some steps of each recipe, in the order in which they were run."""
    rows = [row for row in read_table("recipe", "rounds") if row["model"] == model]
    steps = sorted({row["steps"] for row in rows} - {0})
    cells: dict[tuple[str, ...], dict[int, list[Row]]] = {}
    for row in rows:
        cells.setdefault(_recipe(row), {}).setdefault(row["steps"], []).append(row)
    accuracy = all(
        isinstance(row["accuracy"], float) and row["accuracy"] == row["accuracy"] for row in rows
    )
    last = steps[-1]
    lines = [
        [
            *recipe,
            str(len(found[last])),
            ", ".join(f"{_mean(found[step], 'loss'):.3f}" for step in steps),
            *([bare(f"{_mean(found[last], 'accuracy'):.3f}")] if accuracy else []),
        ]
        for recipe, found in cells.items()
        if last in found
    ]
    head = [
        "start",
        "rank",
        "rate of A",
        "rate of B",
        "seeds",
        f"loss after {', '.join(map(str, steps))} steps",
    ]
    return markdown_table([*head, *(["accuracy"] if accuracy else [])], lines)


def _mean(rows: Sequence[Row], column: str) -> float:
    return fmean(row[column] for row in rows)


def _recipe(row: Row) -> tuple[str, ...]:
    name = NAMES.get(row["start"]) or str(row["start"])
    if row["targets"] != "default":
        name += ", all linear maps"
    rates = (row["rate"], row["rate"] * row["ratio"])
    return (name, str(row["rank"]), *(f"{rate:.4f}".rstrip("0") for rate in rates))
