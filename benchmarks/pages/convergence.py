"""Tables of the study `convergence`: the gap that dropped layers leave, by setting and in time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from benchmarks.pages.markdown import bare, markdown_table, signed
from benchmarks.pages.studies import (
    Seeds,
    final_loss,
    gaps,
    outcome_of,
    read_compared,
    runs_of,
    verdict,
)

RATES = ("none", "a third", "half")
FACTORS = ("steps", "alpha", "cohort")


@dataclass(frozen=True)
class Setting:
    """What a run has beside its rate."""

    steps: int
    alpha: float
    cohort: int
    rounds: int
    schedule: str

    def __str__(self) -> str:
        return f"{self.steps} steps, alpha {self.alpha:g}, {self.cohort} a round"


Found = Mapping[Setting, Mapping[str, Seeds]]
"""Runs by setting, rate and seed."""


def read_grid_and_long() -> tuple[Found, Found]:
    """The grid, whose runs have equally many steps, and the longer runs."""
    found: dict[Setting, dict[str, Seeds]] = {}
    for variant, own in runs_of(read_compared("convergence")[1]).items():
        known = outcome_of(next(iter(own.values())))
        names = ("local_steps", "alpha", "cohort_size", "rounds", "schedule")
        setting = Setting(*(known[name] for name in names))
        found.setdefault(setting, {})[variant.partition(" dropped")[0]] = own
    shortest = min(setting.steps * setting.rounds for setting in found)
    grid = {s: own for s, own in found.items() if s.steps * s.rounds == shortest}
    return grid, {s: own for s, own in found.items() if s not in grid}


def gaps_by_setting() -> str:
    """The gap of a third and of half dropped, every seed."""
    lines = []
    for setting, own in read_grid_and_long()[0].items():
        none, third, half = (own[rate] for rate in RATES)
        small, large, more = (
            gaps(one, other).values() for one, other in ((third, none), (half, none), (half, third))
        )
        lines.append(
            (
                str(setting),
                bare(f"{fmean(map(final_loss, none.values())):.3f}"),
                f"{signed(small)}: {verdict(small)}",
                f"{signed(large)}: {verdict(large)}",
                verdict(more),
            )
        )
    columns = ("setting", "loss, none dropped", "gap, a third", "gap, half", "half over a third")
    return markdown_table(columns, lines)


def gaps_by_factor() -> str:
    """What each factor changes in the gap."""
    grid, _ = read_grid_and_long()
    lines = [line for rate in RATES[1:] for line in _changes(grid, rate)]
    columns = ("dropped", "factor", "from", "to", "change of the gap", "range over the others")
    return markdown_table(columns, lines)


def _changes(grid: Found, rate: str) -> list[tuple[str, ...]]:
    """Of the gap of a rate by each factor; the rate's own line is the gap itself."""
    by_setting = {setting: gaps(own[rate], own["none"]) for setting, own in grid.items()}
    seeds = sorted(set.intersection(*({*found} for found in by_setting.values())))
    whole = [fmean(found[seed] for found in by_setting.values()) for seed in seeds]
    means = [fmean(found[seed] for seed in seeds) for found in by_setting.values()]
    lines: list[tuple[str, ...]] = [(rate, "rate", "none", rate, signed(whole), _range(means))]
    for name in FACTORS:
        low, high = sorted({getattr(setting, name) for setting in by_setting})
        pairs = [
            (by_setting[one], by_setting[other])
            for one in by_setting
            for other in by_setting
            if getattr(one, name) == low and getattr(other, name) == high
            if all(getattr(one, rest) == getattr(other, rest) for rest in FACTORS if rest != name)
        ]
        changes = [fmean(two[seed] - one[seed] for one, two in pairs) for seed in seeds]
        each = [fmean(two[seed] - one[seed] for seed in seeds) for one, two in pairs]
        lines.append((rate, name, f"{low:g}", f"{high:g}", signed(changes), _range(each)))
    return lines


def gaps_in_time() -> str:
    """The gap after a third, two thirds and the end of long runs."""
    _, long = read_grid_and_long()
    lines = []
    for setting, own in long.items():
        ends = [part * setting.rounds // 3 for part in (1, 2, 3)]
        for rate in RATES[1:]:
            parts = [gaps(own[rate], own["none"], partial(final_loss, last=last)) for last in ends]
            left = [parts[-1][seed] / early for seed, early in parts[0].items()]
            lines.append(
                (
                    f"{rate} dropped, {setting.schedule} rate",
                    *(signed(part.values()) for part in parts),
                    ", ".join(f"{one:.0%}" for one in left),
                    verdict(share - 0.5 for share in left),
                )
            )
    one = next(iter(long))
    columns = ("", *(f"gap, round {n * one.rounds // 3}" for n in (1, 2, 3)), "share left", "P2")
    return markdown_table(columns, lines)


def _range(values: list[float]) -> str:
    return bare(f"{min(values):+.3f} to {max(values):+.3f}")
