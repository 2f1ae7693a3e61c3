"""What the clients of a run did: who took part, how long it took, what was sent and left out. Ours.

A table names every client if there are few. Of many clients it has the least, median and most.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from droppeft.quantities import bytes_text, counted, seconds_text
from droppeft.report.page_table import UNKNOWN, PageTable
from droppeft.runs.ledger import RoundRow
from droppeft.tasks.metrics import Metric, primary_metric

NAMED = 30
"""Most clients that are named one by one."""

REASONS = 12
"""Most reasons for which updates were left out."""

NUMBER = re.compile(r"\d+(\.\d+)?")

EXAMPLES = 5
"""Most clients that are named for a reason."""


@dataclass
class ClientTotals:
    """What one client did in all rounds.

    Attributes:
        asked, merged: number of rounds in which it was asked, and its update was merged.
        device: its device profile; empty if unknown.
        steps: optimizer steps.
        measured_s, modelled_s: seconds of each of its local trainings.
        upload_bytes, download_bytes: of all rounds.
        quality: of its own model on its own test rows.
    """

    asked: int = 0
    merged: int = 0
    device: str = ""
    steps: int = 0
    measured_s: list[float] = field(default_factory=list)
    modelled_s: list[float] = field(default_factory=list)
    upload_bytes: int = 0
    download_bytes: int = 0
    quality: float | None = None


def totals_by_client(
    client_rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> dict[int, ClientTotals]:
    """Return what each client did that was asked, or whose own model was evaluated."""
    found: defaultdict[int, ClientTotals] = defaultdict(ClientTotals)
    for row in client_rows:
        client = found[row["client"]]
        client.asked += 1
        client.merged += row["accepted"]
        client.device = row.get("profile", client.device)
        client.steps += row.get("steps", 0)
        client.upload_bytes += row.get("upload_bytes", 0)
        client.download_bytes += row["download_bytes"]
        if "total_wall_s" in row:
            client.measured_s.append(row["total_wall_s"])
        if "client_modelled_s" in row:
            client.modelled_s.append(row["client_modelled_s"])
    name = primary_metric(result).name
    for one in result["personalised"]:
        found[one["client"]].quality = one[name]
    return dict(sorted(found.items()))


def participation(rows: Sequence[RoundRow], found: Mapping[int, ClientTotals], clients: int) -> str:
    """Return sentences about how many clients took part, and how many updates were merged."""
    asked = sum(len(row.cohort) for row in rows)
    merged = sum(row.accepted for row in rows)
    times = [one.merged for one in found.values() if one.merged]
    if not times:
        return f"No update of the {counted(asked, 'client')} that were asked was merged."
    least, most = min(times), max(times)
    rounds = counted(most, "round") if least == most else f"{least} to {counted(most, 'round')}"
    who = "All" if len(times) == clients else f"{len(times):,} of"
    updates = "All" if merged == asked else f"{merged:,} of"
    return (
        f"{who} {counted(clients, 'client')} took part, each in {rounds}. {updates} "
        f"{counted(asked, 'update')} were merged."
    )


def by_client(found: Mapping[int, ClientTotals], metric: Metric) -> PageTable:
    """Return a table with a row for each client."""
    head = (
        *("client", "device", "rounds", "steps", "measured, s per round"),
        *("modelled, s per round", "sent", "received", f"{metric.label}, own test texts"),
    )
    rows = [
        (
            str(number),
            one.device,
            str(one.merged) if one.merged == one.asked else f"{one.merged} of {one.asked}",
            f"{one.steps:,}" if one.steps else UNKNOWN,
            _mean_s(one.measured_s),
            _mean_s(one.modelled_s),
            bytes_text(one.upload_bytes) if one.upload_bytes else UNKNOWN,
            bytes_text(one.download_bytes) if one.download_bytes else UNKNOWN,
            metric.in_percent(one.quality),
        )
        for number, one in found.items()
    ]
    return PageTable(head, rows).known()


def spread(found: Mapping[int, ClientTotals], metric: Metric) -> PageTable:
    """Return a table with the least, the median and the most of what clients did."""
    active = [one for one in found.values() if one.asked]
    sizes = {
        "rounds merged": ([float(one.merged) for one in active], "{:.0f}".format),
        "steps": ([float(one.steps) for one in active if one.steps], "{:,.0f}".format),
        "measured time of a round": (_means(one.measured_s for one in active), seconds_text),
        "modelled time of a round": (_means(one.modelled_s for one in active), seconds_text),
        "sent": ([float(one.upload_bytes) for one in active if one.upload_bytes], bytes_text),
        "received": ([float(one.download_bytes) for one in active], bytes_text),
        f"{metric.label} of the client's model, own test texts": (
            [one.quality for one in found.values() if one.quality is not None],
            metric.in_percent,
        ),
    }
    rows = [
        (name, f"{len(values):,}", *(text(of(values)) for of in (min, median, max)))
        for name, (values, text) in sizes.items()
        if values
    ]
    return PageTable(("of one client", "clients", "least", "median", "most"), rows)


def by_device(found: Mapping[int, ClientTotals]) -> PageTable:
    """Return a table with a row for each device profile; empty for fewer than two."""
    groups: defaultdict[str, list[ClientTotals]] = defaultdict(list)
    for one in found.values():
        if one.device:
            groups[one.device].append(one)
    if len(groups) < 2:
        return PageTable()
    head = ("device", "clients", "updates merged", "measured, s per round", "modelled, s per round")
    rows = [
        (
            device,
            f"{len(ones):,}",
            f"{sum(one.merged for one in ones):,}",
            _mean_s([seconds for one in ones for seconds in one.measured_s]),
            _mean_s([seconds for one in ones for seconds in one.modelled_s]),
        )
        for device, ones in sorted(groups.items())
    ]
    return PageTable(head, rows).known()


def left_out(rows: Sequence[RoundRow]) -> PageTable:
    """Return a table of why updates were not merged, or not as they were, the most often first."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    known: dict[str, str] = {}  # the first of reasons that differ in their numbers alone
    for row in rows:
        for reason, client in _left_out(row):
            found[known.setdefault(NUMBER.sub("", reason), reason)].append(client)
    frequent = sorted(found.items(), key=lambda pair: -len(pair[1]))
    shown = [(reason, f"{len(who):,}", _named(who)) for reason, who in frequent[:REASONS]]
    if rest := frequent[REASONS:]:
        clients = [client for _, who in rest for client in who]
        other = counted(len(rest), "other reason")
        shown.append((f"{other}, in rounds.jsonl", f"{len(clients):,}", _named(clients)))
    return PageTable(("what happened", "times", "clients"), shown)


def _left_out(row: RoundRow) -> Iterator[tuple[str, int]]:
    groups = {
        "not available, by the device profile": row.absent,
        "late on the modelled clock, not merged": row.late,
        "in time, but not among the first that are merged": row.surplus,
        "not chosen by server.merge": row.set_aside,
        "left out by server.direction_check": row.opposed,
        "merged, but clipped by server.clip_norm_multiple": row.clipped,
        "merged, but with a limited weight (server.max_weight_multiple)": row.limited,
    }
    for reason, clients in groups.items():
        yield from ((reason, client) for client in clients)
    for failure in row.failures:
        yield f"not merged: {failure['reason']}", failure["client"]


def _named(clients: Sequence[int]) -> str:
    """Up to five clients, those that occur most often first, and how many others there are."""
    often = [client for client, _ in Counter(clients).most_common()]
    others = len(often) - EXAMPLES
    more = f" and {counted(others, 'other')}" if others > 0 else ""
    return f"{', '.join(map(str, often[:EXAMPLES]))}{more}"


def _means(each: Iterator[Sequence[float]]) -> list[float]:
    return [fmean(values) for values in each if values]


def _mean_s(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" if values else UNKNOWN
