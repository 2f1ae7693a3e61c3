"""Tables about layer dropout itself: what a gate costs, what it saves, what dropping costs."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from benchmarks.pages.markdown import interval, markdown_table
from benchmarks.study import read_table, read_values

Row = Mapping[str, Any]


def savings_by_rate() -> str:
    """A step with gates, against a model that has only the layers that run, and full depth."""
    pairs = {entry["model"]: entry for entry in _of_part("sliced")}
    columns = (
        *("model, batch", "rate", "layers", "time / full depth", "stored / full depth"),
        *("time / sliced", "within 3 %", "losses = sliced"),
    )
    rows = read_table("layer_dropout_cost", "sliced")
    return markdown_table(columns, [_savings_row(pairs[row["model"]], row) for row in rows])


def _savings_row(entry: Row, row: Row) -> Sequence[str]:
    return (
        f"{row['model']}, {entry['size']}",
        str(float(row["rate"])),
        f"{row['active_layers']} of {entry['num_layers']}",
        interval(row, "wall_to_full"),
        f"{row['bytes_to_full']:.3f}",
        interval(row, "wall_to_sliced"),
        _within(row),
        f"{row['same_losses']} of {entry['pairs']}",
    )


def _within(row: Row) -> str:
    """Whether a ratio is at most 1.03, as far as its interval says."""
    if row["wall_to_sliced_high"] <= 1.03:
        return "yes"
    return "no" if row["wall_to_sliced_low"] > 1.03 else "open"


def gates_over_all_rates() -> str:
    """The median ratio of a gated step to a sliced model's over the pairs of all rates."""
    pairs = read_table("layer_dropout_cost", "sliced_pairs")
    lines = []
    for model in dict.fromkeys(row["model"] for row in pairs):
        own = [row for row in pairs if row["model"] == model and row["rate"] > 0]
        lines.append((model, str(len(own)), _together(own, "wall_s"), _together(own, "cpu_s")))
    columns = ("model", "pairs", "time / sliced", "CPU time / sliced")
    return markdown_table(columns, lines)


def _together(pairs: Sequence[Row], kind: str) -> str:
    ratios = np.array([row[f"gated_{kind}"] / row[f"sliced_{kind}"] for row in pairs])
    again = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(again, axis=1), [0.025, 0.975])
    return f"{np.median(ratios):.3f} ({low:.3f}–{high:.3f})"


def peaks() -> str:
    """The worst of many steps, with exact counts and with independent gates."""
    [entry] = _of_part("peaks")
    lines = [
        (
            sampling,
            f"{peak['mean']:.2f} ({peak['least']}–{peak['most']}) of {entry['num_layers']}",
            f"{entry['expected_peak_active'][sampling]:.2f}",
            f"{found['peak_share']:.1%}",
            f"{found['peak_share_of_blocks']:.1%}",
        )
        for sampling, found in entry["samplings"].items()
        for peak in [found["peak_active"]]
    ]
    columns = (
        *("gates", "most layers, mean (range)", "expected", "most bytes / full depth"),
        "… of the blocks' bytes",
    )
    return markdown_table(columns, lines)


def _of_part(part: str) -> list[dict[str, Any]]:
    measured = read_values("layer_dropout_cost")["measured"]
    return [one for one in measured if one["part"] == part and one["accelerator"] == "none"]


PEERS = {
    "gated": "droppeft, `gated`",
    "layer_dropout": "droppeft, `layer_dropout`",
    "if": "an `if` in a loop written for this model",
    "layerdrop": "transformers, `layerdrop`",
    "torchtune": "torchtune, `prepare_layer_dropout`",
    "multiplied": "multiplied by 0 or 1 (stochastic depth)",
    "none": "no dropout",
}


def _peers() -> dict[str, dict[str, Any]]:
    rows = {row["variant"]: row for row in read_table("layer_dropout_cost", "peers")}
    return {title: rows[name] for name, title in PEERS.items()}


def other_implementations() -> str:
    """Time and memory of other ways to drop layers, against ``gated``."""
    columns = ("", "time / ours", "CPU time / ours", "stored / ours", "share of layers that ran")
    return markdown_table(columns, [(title, *_peer_costs(row)) for title, row in _peers().items()])


def _peer_costs(row: Row) -> Sequence[str]:
    if row["wall_to_ours"] is None:  # ours itself
        return ("1", "1", "1", "–")
    return (
        interval(row, "wall_to_ours"),
        interval(row, "cpu_to_ours"),
        f"{row['bytes_to_ours']:.3f}",
        f"{row['ran_least']:.2f}–{row['ran_most']:.2f}",
    )


def behaviour_of_implementations() -> str:
    """What each does with a dropped layer."""
    [entry] = _of_part("peers")
    columns = (
        "",
        "output = sliced model's",
        "a dropped layer's gradient",
        "AdamW moves it",
        "full depth after `eval()`",
        "same gradients when checkpointed",
        "parameter names kept",
        "hidden states returned",
    )
    lines = [
        (title, *_behaviour(row, entry["num_layers"]))
        for title, row in _peers().items()
        if row["equals_sliced"] is not None  # without dropout there is nothing to look at
    ]
    return markdown_table(columns, lines)


def _behaviour(row: Row, layers: int) -> Sequence[str]:
    states = row["hidden_states"]
    return (
        _yes(row["equals_sliced"]),
        row["dropped_gradient"],
        _yes(row["dropped_moves"]),
        _yes(row["evaluates_in_full"]),
        _yes(row["checkpoints"]),
        _yes(row["names_kept"]),
        "–" if states is None else "all" if states == layers + 1 else "of layers that ran",
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


NAMES = {
    "half, bernoulli": "half, independent gates",
    "third, per turn": "third, one draw per local training",
    "third, decay": "third, lower layers more",
    "third, incremental": "third, upper layers more",
    "third, double rate": "third, twice the learning rate",
}
"""Conditions whose recorded name uses a word that the page does not."""

Cell = dict[int, dict[str, Row]]
"""Measurements of a condition by seed, after equal steps and after equal work."""


def quality(model: str, conditions: Sequence[str] | None = None) -> str:
    """Accuracy of one client after training with dropped or frozen layers.

    Args:
        conditions: those to show; all if not given.
    """
    cells: dict[str, Cell] = {}
    for row in read_table("layer_dropout_quality"):
        if row["model"] == model:
            seeds = cells.setdefault(row["condition"], {})
            seeds.setdefault(row["seed"], {})[row["budget"]] = row
    lines = [_quality_row(name, cells[name], cells["full depth"]) for name in conditions or cells]
    columns = (
        *("condition", "seeds", "accuracy, equal steps", "accuracy, equal work"),
        *("CPU time / full depth", "peak stored / full depth"),
    )
    return markdown_table(columns, lines)


def _quality_row(condition: str, found: Cell, full: Cell) -> Sequence[str]:
    return (
        NAMES.get(condition, condition),
        str(len(found)),
        _accuracy("steps", found, full),
        _accuracy("work", found, full),
        _share("train_cpu_s", found, full),
        _share("activation_bytes_peak", found, full),
    )


def _accuracy(end: str, found: Cell, full: Cell) -> str:
    values = [measured[end]["accuracy"] for measured in found.values() if end in measured]
    if not values:
        return "–"
    shared = [seed for seed in found if seed in full and end in found[seed]]
    gaps = [found[seed][end]["accuracy"] - full[seed]["steps"]["accuracy"] for seed in shared]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread} ({fmean(gaps):+.3f})"


def _share(key: str, found: Cell, full: Cell) -> str:
    """Per step, against full depth."""
    ratios = []
    for seed in sorted(found.keys() & full.keys()):
        ours = found[seed].get("steps") or found[seed]["work"]
        theirs = full[seed]["steps"]
        per_step = (lambda one: one[key] / one["step"]) if key == "train_cpu_s" else itemgetter(key)
        ratios.append(per_step(ours) / per_step(theirs))
    return f"{median(ratios):.2f}"


def compiled_blocks() -> str:
    """What compiling saves under changing gates."""
    columns = (
        *("model", "compiled", "time of a step", "CPU time of a step", "first 6 steps", "graphs"),
        *("other lengths", "gradients, largest difference"),
    )
    rows = [
        (
            row["model"],
            row["variant"],
            interval(row, "wall_to_not_compiled"),
            interval(row, "cpu_to_not_compiled"),
            f"{row['first_steps_wall_s']:.0f} s",
            str(row["graphs"]),
            str(row["graphs_of_other_lengths"]),
            f"{row['gradients_differ_by']:.0e}",
        )
        for row in read_table("compile_blocks")
        if row["graphs"] is not None
    ]
    return markdown_table(columns, rows)
