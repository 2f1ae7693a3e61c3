"""Compute what :mod:`droppeft.data.findings` says about the rows of a data set. Ours."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from droppeft.data.findings import RARE_ROWS, Findings
from droppeft.data.labels import MANY_NUMBERS, MISSING_WORDS, number, similar_names
from droppeft.data.partition import NO_ROWS, ClientRows
from droppeft.data.texts import Rows


def compared(
    findings: Findings, train: Sequence[Hashable], test: Sequence[Hashable], labels: Rows
) -> Findings:
    """Add what is found by comparing rows.

    Args:
        findings: what is known so far.
        train: the content of each training row, without its label.
        test: the same for test rows.
        labels: the class of each training row, shape (rows,).
    """
    seen: dict[Hashable, int] = {}
    pairs = zip(train, labels.tolist(), strict=True)
    disputed = {content for content, label in pairs if seen.setdefault(content, label) != label}
    return replace(
        findings,
        train_rows=len(train),
        test_rows=len(test),
        repeated=len(train) - len(seen),
        contradictory=sum(content in disputed for content in train) if disputed else 0,
        in_both=sum(content in seen for content in test),
    )


def of_classes(findings: Findings, names: Sequence[str], labels: Rows) -> Findings:
    """Add what is found about classes.

    Args:
        findings: what is known so far.
        names: of the classes.
        labels: the class of each training row, shape (rows,).
    """
    counts = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
    are_numbers = all(number(name) is not None for name in names)
    few_each = len(names) > MANY_NUMBERS and np.median([*counts.values()]) < RARE_ROWS
    return replace(
        findings,
        different_numbers=len(names) if are_numbers and few_each else 0,
        similar_classes=similar_names(names),
        rare_classes={name: count for name, count in counts.items() if count < RARE_ROWS},
        missing_words={
            name: count for name, count in counts.items() if name.casefold() in MISSING_WORDS
        },
    )


def partitioned(
    findings: Findings,
    keys: Sequence[str] | None,
    clients: Sequence[ClientRows],
    min_rows: int,
    set_aside: Rows = NO_ROWS,
) -> Findings:
    """Add which training rows are set aside, and which others a partition leaves out.

    Args:
        findings: what is known so far.
        keys: owner of each training row.
        clients: the rows that each client holds.
        min_rows: the setting ``partition.min_rows``.
        set_aside: rows that were set aside before the partition.
    """
    rest = findings.train_rows - len(set_aside)
    findings = replace(findings, train_rows=rest, set_aside_rows=len(set_aside))
    used = np.concatenate([part for one in clients for part in one.parts])
    if keys is None or len(used) == rest:
        return findings
    others = Counter(keys)
    others.subtract(keys[row] for row in set_aside)
    for owner in {keys[row] for row in used}:
        del others[owner]
    others = +others
    since = (
        f"with fewer than partition.min_rows={min_rows} rows each"
        if max(others.values()) < min_rows
        else f"with the fewest rows, since clients={len(clients)}"
    )
    return replace(
        findings,
        train_rows=len(used),
        left_out_rows=rest - len(used),
        left_out_owners=len(others),
        left_out_since=since,
    )


def measured(findings: Findings, lengths: Rows, max_length: int, longest_possible: int) -> Findings:
    """Add the lengths of training rows.

    Args:
        findings: what is known so far.
        lengths: tokens of rows before truncation, shape (rows,); all, or a sample.
        max_length: tokens after which a row is truncated.
        longest_possible: tokens that the model has positions for.
    """
    return replace(
        findings,
        max_length=max_length,
        median_length=float(np.median(lengths)),
        truncated=float(np.mean(lengths > max_length)),
        longest_possible=longest_possible,
    )


def dropped(findings: Findings, counts: Counter[str]) -> Findings:
    """Add how many rows were left out since they lack a text, a label or an owner."""
    return replace(
        findings,
        incomplete=counts["any"],
        without_text=counts["text"],
        without_label=counts["label"],
        without_owner=counts["owner"],
    )
