"""Tokenise texts once, without padding, and make batches of them. Ours."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from droppeft.data.texts import Rows, TextTable
from droppeft.errors import DroppeftError

BLOCK_ROWS = 4096  # rows per tokenizer call, whose result takes far more memory than the ids
WINDOW_BATCHES = 16  # rows are sorted by length within so many batches

UNTRUNCATED = 2**31 - 1
"""A length that no row reaches."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenRows:
    """Tokenised rows of different length, concatenated.

    Attributes:
        columns: ``input_ids`` and other inputs of the model (``token_type_ids``), each of shape
            (tokens of all rows,).
        offsets: start of each row and end of the last one, shape (rows + 1,).
    """

    columns: Mapping[str, Ids]
    offsets: Rows

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Rows:
        """Number of tokens of each row, including special tokens, shape (rows,)."""
        return np.diff(self.offsets)

    def row(self, number: int) -> dict[str, Ids]:
        """Return the columns of a row, each of shape (S,)."""
        start, end = self.offsets[number : number + 2]
        return {name: column[start:end] for name, column in self.columns.items()}


@dataclass(frozen=True)
class TokenTable(TokenRows):
    """Tokenised texts with a class each.

    Attributes:
        labels: class indices, shape (rows,).
    """

    labels: Rows


def tokenise(table: TextTable, tokenizer: Any, max_length: int) -> TokenTable:
    """Tokenise every row and truncate it to ``max_length`` tokens.

    Of a pair, the longer text is truncated first. 4,000 texts of 90 characters take half a second
    of processor time, so tokens are not stored between runs.

    Args:
        table: the texts.
        tokenizer: a fast tokenizer of transformers.
        max_length: largest number of tokens of a row.

    Raises:
        DroppeftError: if a text has no tokens, as an empty text with a decoder's tokenizer.
    """
    blocks = [
        _tokenise_block(table, slice(start, start + BLOCK_ROWS), tokenizer, max_length)
        for start in range(0, len(table), BLOCK_ROWS)
    ]
    lengths = [len(ids) for block in blocks for ids in block["input_ids"]]
    if 0 in lengths:
        raise DroppeftError(f"text {lengths.index(0) + 1} has no tokens; remove empty texts")
    return TokenTable(
        columns={
            name: np.concatenate([_flat(block[name]) for block in blocks]) for name in blocks[0]
        },
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        labels=table.labels,
    )


def _tokenise_block(
    table: TextTable, rows: slice, tokenizer: Any, max_length: int
) -> Mapping[str, list[list[int]]]:
    encoding: Mapping[str, list[list[int]]] = tokenizer(
        list(table.texts[rows]),
        list(table.pairs[rows]) if table.pairs else None,
        truncation="longest_first",
        max_length=max_length,
        return_attention_mask=False,
    )
    return encoding


def _flat(rows: Iterable[list[int]]) -> Ids:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32)


def grouped_batches(
    rows: Rows, lengths: Rows, batch_size: int, rng: np.random.Generator
) -> list[Rows]:
    """Return the batches of a shuffled epoch, each with rows of similar length.

    Rows are shuffled and sorted by length within windows of 16 batches; then the batches are
    shuffled. There is little padding, and batches still have different rows in every epoch.

    Args:
        rows: indices of the rows, each of which is used once.
        lengths: length of every row of the table.
        batch_size: size of all batches except one, which has the remaining rows.
        rng: generator of all random numbers.
    """
    shuffled = rng.permutation(rows)
    window = WINDOW_BATCHES * batch_size
    batches = [
        batch
        for start in range(0, len(rows), window)
        for batch in ordered_batches(shuffled[start : start + window], lengths, batch_size)
    ]
    return [batches[number] for number in rng.permutation(len(batches))]


def ordered_batches(rows: Rows, lengths: Rows, batch_size: int) -> list[Rows]:
    """Return batches of the rows from short to long; the last batch may be smaller."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    return [ordered[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def pad_batch(
    table: TokenTable,
    rows: Rows,
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> dict[str, Rows]:
    """Return a padded batch: columns and ``attention_mask`` of shape (B, S), and ``labels`` (B,).

    S is the length of the longest row. Columns other than ``input_ids`` are padded with 0, as
    transformers pads token types.
    """
    padding = dict.fromkeys(table.columns, 0) | {"input_ids": pad_token_id}
    return {
        **pad_columns(table, table.columns, rows, padding, padding_side),
        "labels": table.labels[rows],
    }


def pad_columns(
    table: TokenRows,
    columns: Mapping[str, Ids],
    rows: Rows,
    padding: Mapping[str, int],
    padding_side: Literal["right", "left"] = "right",
) -> dict[str, Rows]:
    """Return columns with a value per token, padded to the longest row, and ``attention_mask``.

    Args:
        table: has the lengths of the rows.
        columns: each of shape (tokens of all rows,).
        rows: B indices of rows.
        padding: value that pads each column.
        padding_side: side of the padding.

    Returns:
        Arrays of shape (B, S), by name, where S is the length of the longest row.
    """
    lengths = table.lengths[rows]
    position = np.arange(lengths.max())
    start = np.zeros_like(lengths) if padding_side == "right" else lengths.max() - lengths
    within = position - start[:, None]
    mask = (within >= 0) & (within < lengths[:, None])
    tokens = (table.offsets[rows][:, None] + within)[mask]
    batch = {"attention_mask": mask.astype(np.int64)}
    for name, column in columns.items():
        batch[name] = np.full(mask.shape, padding[name], np.int64)
        batch[name][mask] = column[tokens]
    return batch
