"""Scores of texts, against values computed by hand."""

import pytest

from droppeft.errors import DroppeftError
from droppeft.tasks.text_metrics import text_scores


def test_equal_texts_have_the_best_scores() -> None:
    scores = text_scores(["Return the sum.\n", "A b."], ["Return the sum.", "A b."])
    assert (scores.rouge_l, scores.exact_match) == (1.0, 1.0)
    assert scores.chrf == pytest.approx(1.0)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # Common: "return", "sum", "numbers"; of 4 and of 5 words: P = 3/4, R = 3/5.
    first = text_scores(["Return sum of numbers"], ["return the sum, all numbers"])
    assert first.rouge_l == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    both = text_scores(["Return sum of numbers", "x"], ["return the sum, all numbers", "y"])
    assert both.rouge_l == pytest.approx(first.rouge_l / 2)
    assert (both.exact_match, first.exact_match) == (0.0, 0.0)


def test_chrf_is_the_f2_of_character_n_grams() -> None:
    # One character of two in common, and no pair: n-grams of orders 1 and 2 count.
    # P = R = 1/2 for order 1 and 0 for order 2; so P = R = F = 1/4.
    assert text_scores(["ab"], ["ac"]).chrf == pytest.approx(0.25)
    assert text_scores(["日本語の文"], ["日本語の文"]).chrf == pytest.approx(1.0)


def test_missing_references_are_refused() -> None:
    with pytest.raises(DroppeftError, match=r"^2 generated texts cannot be compared with 1 refer"):
        text_scores(["a", "b"], ["a"])
    with pytest.raises(DroppeftError, match=r"at least one$"):
        text_scores([], [])
