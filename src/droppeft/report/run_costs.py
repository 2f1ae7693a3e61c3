"""What a run cost, measured and modelled, and what was done in each round, for its page. Ours."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from droppeft.quantities import bytes_text, joules_text, percent, seconds_text
from droppeft.report.closing import layers_above_the_frozen
from droppeft.report.page_table import UNKNOWN, PageTable
from droppeft.runs.ledger import RoundRow
from droppeft.tasks.metrics import Metric

LATE = 3
"""What the configurator chose in the end is shown for the last of so many parts of the rounds."""


def costs(result: Mapping[str, Any]) -> PageTable:
    """Return what a run cost: measured on its machine, and modelled for the clients' devices."""
    both = [
        ("all rounds, clients side by side", "round_measured_s", "round_modelled_s"),
        ("until the target", "time_to_target_measured_s", "time_to_target_modelled_s"),
    ]
    rows = [
        (name, seconds_text(result[measured]), seconds_text(result[modelled]))
        for name, measured, modelled in both
    ]
    only_measured = {
        "all rounds on this machine": seconds_text(result["host_wall_s"]),
        "training steps of all clients, added up": seconds_text(result["train_wall_s"]),
        "evaluation in the rounds": seconds_text(result["evaluation_wall_s"]),
        "preparation": seconds_text(result["prepare_wall_s"]),
        "sent by all clients": bytes_text(result["upload_bytes"]),
        "received by all clients": bytes_text(result["download_bytes"]),
        "stored for the backward pass of a step, at most": bytes_text(
            result["activation_bytes_peak"]
        ),
        **_layers_of_a_step(result),
    }
    rows += [(name, value, UNKNOWN) for name, value in only_measured.items()]
    rows += [
        ("energy of all clients", UNKNOWN, joules_text(result["energy_modelled_j"])),
        (
            "share of the time that clients wait for the slowest one",
            UNKNOWN,
            percent(result["idle_modelled_share"]),
        ),
    ]
    known = [row for row in rows if row[1:] != (UNKNOWN, UNKNOWN)]
    return PageTable(("", "measured", "modelled"), known)


def _layers_of_a_step(result: Mapping[str, Any]) -> dict[str, str]:
    """Layers by what they did in a step, mean over the steps."""
    modes = {
        "trained": "mean_active_layers",
        "run forward only": "mean_forward_layers",
        "skipped": "mean_skipped_layers",
    }
    layers = layers_above_the_frozen(result)
    return {
        f"layers {mode} in a step, of {layers}": f"{result[key]:.2f}"
        for mode, key in modes.items()
        if result.get(key)
    }


def rounds_table(rows: Sequence[RoundRow], metric: Metric) -> PageTable:
    """Return a table with a row for each round."""
    head = (
        *("round", metric.label, "training loss", "updates merged", "layers trained"),
        *("measured", "modelled", "sent", "received"),
    )
    cells = [
        (
            str(row.round),
            metric.in_percent(row.quality.get(metric.key("global"))),
            UNKNOWN if row.train_loss is None else f"{row.train_loss:.3f}",
            f"{row.accepted:,} of {len(row.cohort):,}",
            UNKNOWN if row.mean_active_layers is None else f"{row.mean_active_layers:.2f}",
            seconds_text(row.host_wall_s),
            seconds_text(row.round_modelled_s),
            bytes_text(row.upload_bytes),
            bytes_text(row.download_bytes),
        )
        for row in rows
    ]
    return PageTable(head, cells).known()


def times_chosen(rows: Sequence[RoundRow]) -> PageTable:
    """Return how often the configurator chose each arm, in all and in the last third of rounds.

    The table is empty for a run without a configurator.
    """
    noted = [row.notes for row in rows if row.notes and row.notes.get("chosen")]
    if not noted:
        return PageTable()
    third = max(1, len(noted) // LATE)  # rounds
    every, late = (
        Counter(notes["labels"][str(arm)] for notes in some for arm in notes["chosen"].values())
        for some in (noted, noted[-third:])
    )
    best = noted[-1]["labels"][str(noted[-1]["best"])]
    cells = [
        (f"{label} (best at the end)" if label == best else label, f"{count:,}", f"{late[label]:,}")
        for label, count in every.most_common()
    ]
    last = "in the last round" if third == 1 else f"in the last {third:,} rounds"
    return PageTable(("trained layers", "times chosen", last), cells)
