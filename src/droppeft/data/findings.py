"""What reading a data set found and did. Ours."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from droppeft.quantities import counted, percent

RARE_ROWS = 10
"""A class with fewer training rows than this is rare."""

TRUNCATED_SHARE = 0.01
"""Truncation is mentioned if at least this share of the training rows is truncated."""

UNLIMITED = 10**6
"""Models without a limit, and tokenizers that do not know it, have more positions than this."""

LISTED = 3  # names in a sentence


@dataclass(frozen=True)
class Findings:
    """What was found in a data set, and what was done with its rows.

    ``rows_read`` is the sum of ``train_rows``, ``test_rows``, ``set_aside_rows``, ``incomplete``,
    the rows beyond a limit, and those that the partition leaves out.

    Attributes:
        remarks: how the files were read, as parts of sentences.
        columns: the column that each kind of value was read from.
        rows_read: rows of all splits.
        train_rows, test_rows: rows that are used.
        set_aside_rows: training rows on which layers are measured, and which no client has.
        incomplete: rows that were left out since they lack a text, a label or an owner.
        without_text, without_label, without_owner: how many of them lack it. One can lack several.
        beyond_limit: rows left out by ``source.max_train_rows`` and ``source.max_test_rows``.
        left_out_rows: training rows that the partition leaves out.
        left_out_owners: owners of all of these rows.
        left_out_since: why, as the end of a sentence.
        stripped_labels: labels that had spaces around them, which were removed.
        repeated: training rows whose text is also in an earlier training row.
        contradictory: training rows with a text that also has another label.
        in_both: test rows whose text is also in a training row.
        similar_classes: groups of classes whose names differ only in case, spaces or punctuation.
        different_numbers: number of classes if they are many numbers with few rows each; else 0.
        rare_classes: number of training rows of each class that has fewer than ``RARE_ROWS``.
        missing_words: number of training rows of classes whose name usually means a missing value.
        max_length: the setting ``training.max_length``; 0 if lengths are not known.
        median_length: median tokens of a training row before truncation.
        truncated: share of the training rows that are truncated.
        longest_possible: tokens that the model has positions for.
        language: of the texts, if the model's tokenizer cuts their words into small pieces.
        pieces_per_word: tokens of a word then, mean over all words.
    """

    remarks: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    rows_read: int = 0
    train_rows: int = 0
    test_rows: int = 0
    set_aside_rows: int = 0
    incomplete: int = 0
    without_text: int = 0
    without_label: int = 0
    without_owner: int = 0
    beyond_limit: int = 0
    left_out_rows: int = 0
    left_out_owners: int = 0
    left_out_since: str = ""
    stripped_labels: int = 0
    repeated: int = 0
    contradictory: int = 0
    in_both: int = 0
    similar_classes: tuple[tuple[str, ...], ...] = ()
    different_numbers: int = 0
    rare_classes: Mapping[str, int] = field(default_factory=dict)
    missing_words: Mapping[str, int] = field(default_factory=dict)
    max_length: int = 0
    median_length: float = 0.0
    truncated: float = 0.0
    longest_possible: int = 0
    language: str = ""
    pieces_per_word: float = 0.0

    def as_tree(self) -> dict[str, Any]:
        """Return all values and the sentences about them, for ``result.json``."""
        return {**asdict(self), "sentences": self.sentences()}

    def sentences(self) -> list[str]:
        """Return a sentence for everything that the user should know; none if all is well."""
        return [*self._about_reading(), *self._about_classes(), *self._about_rows()]

    def _about_reading(self) -> list[str]:
        found = list(self.remarks)
        if self.stripped_labels:
            found.append(
                f"{counted(self.stripped_labels, 'label')} had spaces around, which were removed "
                "(source.strip_labels)"
            )
        lacking = {
            "a text": self.without_text,
            "a label": self.without_label,
            "an owner": self.without_owner,
        }
        parts = [
            f"{counted(count, 'row')} without {kind}" for kind, count in lacking.items() if count
        ]
        if parts:
            several = sum(lacking.values()) > self.incomplete
            in_all = f", {counted(self.incomplete, 'row')} in all" if several else ""
            found.append(f"left out: {', '.join(parts)}{in_all} (source.missing=drop)")
        return found

    def _about_classes(self) -> list[str]:
        found = []
        if self.similar_classes:
            groups = [" and ".join(map(repr, group)) for group in self.similar_classes]
            found.append(
                f"classes with nearly the same name: {_listed(groups)}; spell them alike if they "
                "are one"
            )
        if self.different_numbers:
            found.append(
                f"{self.columns.get('label', 'label')} has {self.different_numbers:,} different "
                "numbers; if it is a quantity, it cannot be learnt (regression is not supported)"
            )
        if self.rare_classes:
            rare = [f"{name} ({count:,})" for name, count in self.rare_classes.items()]
            many = f"{len(rare)} classes have" if len(rare) > 1 else "one class has"
            found.append(f"{many} fewer than {RARE_ROWS} training rows: {_listed(rare)}")
        if self.missing_words:
            words = [f"{name!r} ({counted(n, 'row')})" for name, n in self.missing_words.items()]
            found.append(f"a class is named as if its label were missing: {_listed(words)}")
        return found

    def _about_rows(self) -> list[str]:
        found = []
        if self.repeated:
            found.append(
                f"{counted(self.repeated, 'training row')} with the text of an earlier one"
            )
        if self.contradictory:
            found.append(
                f"{counted(self.contradictory, 'training row')} with a text that has another label "
                "in another row"
            )
        if self.in_both:
            found.append(
                f"the texts of {self.in_both:,} of {counted(self.test_rows, 'test row')} are also "
                "in training rows, which makes the measured quality too high"
            )
        if self.set_aside_rows:
            found.append(
                f"{counted(self.set_aside_rows, 'training row')} were set aside for calibration "
                "and given to no client"
            )
        if self.left_out_rows:
            found.append(self._about_left_out())
        if self.language:
            found.append(
                f"the texts seem to be in {self.language}, whose words the model's tokenizer cuts "
                f"into {self.pieces_per_word:.1f} tokens on average; a multilingual model, or one "
                "of that language, would learn more (model=NAME)"
            )
        if self.truncated >= TRUNCATED_SHARE:
            more = (
                f"; the model takes up to {self.longest_possible:,}"
                if self.max_length < self.longest_possible < UNLIMITED
                else ""
            )
            found.append(
                f"{percent(self.truncated)} of the training rows are longer than "
                f"training.max_length={self.max_length} tokens and are cut (median "
                f"{self.median_length:,.0f} tokens{more})"
            )
        return found

    def _about_left_out(self) -> str:
        all_rows = self.train_rows + self.left_out_rows
        return (
            f"the partition leaves out {self.left_out_rows:,} of "
            f"{counted(all_rows, 'training row')}: those of "
            f"{counted(self.left_out_owners, 'owner')} {self.left_out_since}"
        )


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - LISTED:,} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more
