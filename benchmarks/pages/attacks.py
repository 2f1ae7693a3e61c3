"""Tables of what malicious clients do, by attack, number of attackers and merge rule."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.pages.markdown import bare, markdown_table
from benchmarks.study import read_table

PLAIN = "mean, no bounds"
RULES = (PLAIN, "bounds", "default", "median", "trimmed mean", "Krum", "multi-Krum")
CHOICES = ("multiple 1", "multiple 1.5", "bounds", "whole update")
CHECKS = ("default", "each round alone", "check of ten")
FIRST = ("sign flip", "sign flip x 10", "sign flip x 100")
NONE = "none"

Key = tuple[str, float, str]


def attacks(share: float = 0.2, partition: str = "dirichlet") -> str:
    """Accuracy by attack and rule, on one seed; the first row has no attackers."""
    found = _accuracies(partition, seed=0)
    rows = [
        [attack, *(_shown(found.get((attack, part, rule))) for rule in RULES)]
        for attack, part in _attacks(found, share)
    ]
    return markdown_table(("attack", *RULES), rows)


def attacks_by_seed() -> str:
    """Points lost against honest clients with the plain mean, for every seed."""
    cells = [(NONE, 0.0, rule) for rule in RULES] + [
        (attack, 0.2, rule) for rule in ("default", "bounds", "multi-Krum") for attack in FIRST
    ]
    head = ("attack", "rule", "points lost, by seed", "mean", "honest updates left out")
    return markdown_table(head, list(_points_lost("dirichlet", (0, 1, 2, 3), cells)))


def attacks_elsewhere(partition: str) -> str:
    """The same for other clients, and for the other checks that were tried."""
    cells = [
        (attack, share, rule)
        for attack, share in ((NONE, 0.0), *((attack, 0.2) for attack in FIRST))
        for rule in ("bounds", *CHECKS)
    ]
    head = ("attack", "rule", "points lost, by seed", "mean", "honest updates left out")
    return markdown_table(head, list(_points_lost(partition, (0, 1, 2), cells)))


def _points_lost(partition: str, seeds: Sequence[int], cells: Sequence[Key]) -> Iterator[list[str]]:
    """For each cell, the points lost against honest clients with the plain mean."""
    tables = [_rows(partition, seed) for seed in seeds]
    for attack, share, rule in cells:
        key = (attack, share, rule)
        held = [found for found in tables if key in found]
        lost = [100 * (f[NONE, 0.0, PLAIN]["accuracy"] - f[key]["accuracy"]) for f in held]
        if lost:
            each = ", ".join(_points(points) for points in lost)
            left_out = ", ".join(f"{found[key]['opposed_honest']}" for found in held)
            mean = _points(fmean(lost))
            yield [attack, rule, each, mean, left_out if rule in CHECKS else "–"]


def bounds_compared() -> str:
    """What other multiples and one norm for the whole update would give."""
    found = _rows("dirichlet", seed=0)
    cells = [(NONE, 0.0), ("sign flip", 0.2), ("sign flip x 1.9", 0.2), ("sign flip x 10", 0.2)]
    rows = [
        [
            rule,
            *(_shown(_value(found, (*cell, rule), "accuracy")) for cell in cells),
            _count(found, (NONE, 0.0, rule), "clipped"),
            _count(found, (NONE, 0.0, rule), "limited"),
        ]
        for rule in CHOICES
    ]
    head = ("bound", "honest", *(attack for attack, _ in cells[1:]))
    return markdown_table((*head, "honest updates clipped", "limited"), rows)


def _rows(partition: str, seed: int) -> dict[Key, dict[str, Any]]:
    """The cells of a partition and a seed, by attack, share and rule."""
    return {
        (row["attack"], row["share"], row["rule"]): row
        for row in read_table("attacks", "cells")
        if (row["partition"], row["seed"]) == (partition, seed)
    }


def _accuracies(partition: str, seed: int) -> dict[Key, float]:
    return {key: row["accuracy"] for key, row in _rows(partition, seed).items()}


def _attacks(found: Mapping[Key, Any], share: float) -> list[tuple[str, float]]:
    """No attack, and the attacks of a share of the clients, in the order of the table."""
    return list(
        dict.fromkeys(
            (a, part) for a, part, _ in sorted(found, key=_order(found)) if part in (0.0, share)
        )
    )


def _points(lost: float) -> str:
    """One digit, and no sign of a zero."""
    return f"{round(lost, 1) + 0.0:.1f}"


def _order(found: Mapping[Key, Any]) -> Callable[[Key], tuple[bool, int]]:
    places = {key: place for place, key in enumerate(found)}
    return lambda key: (key[0] != NONE, places[key])


def _value(found: Mapping[Key, Mapping[str, Any]], key: Key, column: str) -> float | None:
    return found[key][column] if key in found else None


def _count(found: Mapping[Key, Mapping[str, Any]], key: Key, column: str) -> str:
    value = _value(found, key, column)
    return "–" if value is None else f"{value}"


def _shown(accuracy: float | None) -> str:
    return "–" if accuracy is None else bare(f"{accuracy:.3f}")
