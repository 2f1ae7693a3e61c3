"""Tables about training language models: the completion loss, and weights in fewer bits."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.pages.markdown import markdown_table, megabytes
from benchmarks.study import read_table, read_values

Row = Mapping[str, Any]

WHOLE = "all logits (transformers)"
"""The variant of the completion loss with which the others are compared."""


def completion_loss_equality() -> str:
    """Largest differences of losses and gradients from transformers' and TRL's, over batches."""
    rows = read_table("completion_loss", "equality")
    lines = []
    for other in dict.fromkeys(row["compared_with"] for row in rows):
        found = [row for row in rows if row["compared_with"] == other]
        losses = [abs(row["our_loss"] / row["their_loss"] - 1) for row in found]
        gradients = [row["gradients_differ_by"] for row in found]
        lines.append((other, str(len(found)), f"{max(losses):.1e}", f"{max(gradients):.1e}"))
    return markdown_table(("compared with", "batches", "losses", "gradients"), lines)


def completion_loss_costs() -> str:
    """Processor time and peak memory of a step, with logits of all tokens and of completions."""
    steps = read_table("completion_loss", "steps")
    peaks = {row["variant"]: row["peak_bytes"] for row in read_table("completion_loss", "memory")}
    times = {
        variant: [row["cpu_s"] for row in steps if row["variant"] == variant] for variant in peaks
    }
    lines = [
        (
            variant,
            _seconds(found),
            f"{median(found) / median(times[WHOLE]):.2f}",
            megabytes(peaks[variant]),
            f"{peaks[variant] / peaks[WHOLE]:.2f}",
        )
        for variant, found in times.items()
    ]
    return markdown_table(("step", "time", "of the first", "memory", "of the first"), lines)


def quantised_training() -> str:
    """Memory, time and loss of every combination of weights, drop rate and checkpointing."""
    steps, losses = (read_table("quantized_training", name) for name in ("steps", "loss"))
    times, sizes = _by_cell(steps), read_values("quantized_training")["weight_bytes"]
    last = max(row["round"] for row in losses)
    after = {_cell(row)[:2]: row["loss"] for row in losses if row["round"] == last}
    whole = median(row["cpu_s"] for row in times["fp32", 0, "off"])
    lines = []
    for memory in read_table("quantized_training", "memory"):
        cell = _cell(memory)
        found = [row["cpu_s"] for row in times[cell]]
        lines.append(
            (
                memory["weights"],
                f"{memory['rate']:g}",
                memory["checkpointing"],
                megabytes(sizes[memory["weights"]] + memory["grown_bytes"]),
                megabytes(memory["activation_bytes"]),
                _seconds(found),
                f"{median(found) / whole:.2f}",
                f"{after[cell[:2]]:.3f}",
            )
        )
    heads = (
        *("weights", "drop rate", "checkpointing", "memory", "activations"),
        *("time of a step", "of the first", f"loss after {last} steps"),
    )
    return markdown_table(heads, lines)


def quantised_weights() -> str:
    """Bytes and untrained loss of each kind of weights, and cells that checkpointing changed."""
    content, losses = read_values("quantized_training"), read_table("quantized_training", "loss")
    cells = _by_cell(read_table("quantized_training", "steps"))
    before = {row["weights"]: row["loss"] for row in losses if row["round"] == 0}
    lines = []
    for weights, size in content["weight_bytes"].items():
        pairs = [
            [[row["adapter"] for row in cells[weights, rate, on]] for on in ("off", "on")]
            for kind, rate, on in cells
            if (kind, on) == (weights, "off")
        ]
        same = sum(off == on for off, on in pairs)
        lines.append(
            (weights, megabytes(size), f"{before[weights]:.3f}", f"{same} of {len(pairs)}")
        )
    heads = ("weights", "bytes", "loss before training", "rates with the same adapter")
    return markdown_table(heads, lines)


def bf16_products() -> str:
    """Time of a step with bf16 weights, multiplied by droppeft and by torch."""
    [row] = read_table("quantized_training", "products")
    cells = _by_cell(read_table("quantized_training", "steps"))
    ours, plain = ([one["cpu_s"] for one in cells[kind, 0.5, "off"]] for kind in ("bf16", "fp32"))
    lines = [
        ("fp32 weights", _seconds(plain)),
        ("bf16 weights, products in fp32 (droppeft)", _seconds(ours)),
        ("bf16 weights, products of torch", f"{row['cpu_s']:.2f} s"),
    ]
    return markdown_table(("step at a drop rate of 0.5", "time"), lines)


def _by_cell(rows: Sequence[Row]) -> dict[tuple[str, float, str], list[Row]]:
    found: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        found.setdefault(_cell(row), []).append(row)
    return found


def _cell(row: Row) -> tuple[str, float, str]:
    return row["weights"], row["rate"], row["checkpointing"]


def _seconds(values: Sequence[float]) -> str:
    return f"{median(values):.2f} s ({min(values):.2f}–{max(values):.2f})"
