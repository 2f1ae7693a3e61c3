"""Tables of what malicious clients do, by attack, number of attackers and merge rule."""

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from benchmarks.pages.markdown import bare, markdown_table
from benchmarks.study import read_table

RULES = ("mean, no bounds", "default", "median", "trimmed mean", "Krum", "multi-Krum")
CHOICES = ("multiple 1", "multiple 1.5", "default", "whole update")
FIRST = ("sign flip", "sign flip x 10", "sign flip x 100")
NONE = "none"


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
    tables = [_accuracies("dirichlet", seed) for seed in (0, 1, 2)]
    cells = [(NONE, 0.0, rule) for rule in RULES] + [
        (attack, 0.2, rule) for rule in ("default", "multi-Krum") for attack in FIRST
    ]
    rows = []
    for attack, share, rule in cells:
        lost = [
            100 * (found[NONE, 0.0, RULES[0]] - found[attack, share, rule])
            for found in tables
            if (attack, share, rule) in found
        ]
        if lost:
            each = ", ".join(f"{points:.1f}" for points in lost)
            rows.append([attack, rule, each, f"{fmean(lost):.1f}"])
    return markdown_table(("attack", "rule", "points lost, by seed", "mean"), rows)


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


Key = tuple[str, float, str]


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
