"""Texts tokenised once, kept without padding, and the batches that are made of them; ours."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import tokenizers

from droppeft.data.cache import store
from droppeft.data.texts import Rows, TextTable
from droppeft.errors import DroppeftError

RECIPE = 1
"""Counts changes of what this module stores; part of the cache's key."""

BLOCK_ROWS = 4096  # handed to the tokenizer at once: its own results take far more memory than ids
WINDOW_BATCHES = 16  # among so many batches' rows, those of similar length go together

_OFFSETS, _DIGEST = "offsets", "digest"

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenTable:
    """Rows of different length, laid end to end.

    Attributes:
        columns: ``input_ids`` and what else the model reads (``token_type_ids``), each of shape
            (tokens of all rows,).
        offsets: where each row starts and the last one ends, shape (rows + 1,).
        labels: class indices, shape (rows,).
    """

    columns: Mapping[str, Ids]
    offsets: Rows
    labels: Rows

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Rows:
        """Tokens of each row, special ones included, shape (rows,)."""
        return np.diff(self.offsets)

    def row(self, number: int) -> dict[str, Ids]:
        """One row's columns, each of shape (S,)."""
        start, end = self.offsets[number : number + 2]
        return {name: column[start:end] for name, column in self.columns.items()}


def tokenise(table: TextTable, tokenizer: Any, max_length: int, cache: Path | None) -> TokenTable:
    """Tokenise every row, cut at ``max_length`` tokens (of a pair, the longer text loses first).

    Args:
        tokenizer: a fast tokenizer of transformers.
        cache: folder in which the result is kept, ``None`` for nowhere. The file's name hashes
            texts, pairs, the tokenizer's own serialisation and ``max_length``; a file that is
            not what was written is made anew.

    Raises:
        DroppeftError: a text without tokens, as an empty one is for a decoder's tokenizer.
    """
    path = cache and cache / f"tokens-{_key(table, tokenizer, max_length)}.safetensors"
    arrays = _read_cache(path, len(table)) if path else None
    if arrays is None:
        arrays = _tokenise(table, tokenizer, max_length)
        if path:
            store(path, safetensors.numpy.save({**arrays, _DIGEST: _digest(arrays)}))
    offsets = arrays.pop(_OFFSETS)
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        raise DroppeftError(f"text {empty[0] + 1} has no tokens at all; leave empty texts out")
    return TokenTable(columns=arrays, offsets=offsets, labels=table.labels)


def _tokenise(table: TextTable, tokenizer: Any, max_length: int) -> dict[str, npt.NDArray[Any]]:
    blocks = [
        _tokenise_block(table, slice(start, start + BLOCK_ROWS), tokenizer, max_length)
        for start in range(0, len(table), BLOCK_ROWS)
    ]
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.concatenate([_flat(block[name]) for block in blocks]) for name in blocks[0]
    }
    lengths = [len(ids) for block in blocks for ids in block["input_ids"]]
    arrays[_OFFSETS] = np.cumsum([0, *lengths], dtype=np.int64)
    return arrays


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


def _key(table: TextTable, tokenizer: Any, max_length: int) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from the tokenizer's last call; ours sets both.
    backend["truncation"] = backend["padding"] = None
    settings = [tokenizer.model_input_names, tokenizer.truncation_side, tokenizers.__version__]
    content = [RECIPE, max_length, backend, settings, table.texts, table.pairs]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _digest(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _read_cache(path: Path, rows: int) -> dict[str, npt.NDArray[Any]] | None:
    try:
        arrays: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(path.read_bytes())
        kept = arrays.pop(_DIGEST)
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    whole = np.array_equal(kept, _digest(arrays)) and len(arrays[_OFFSETS]) == rows + 1
    return arrays if whole else None


def grouped_batches(
    rows: Rows, lengths: Rows, batch_size: int, rng: np.random.Generator
) -> list[Rows]:
    """One shuffled epoch in which the rows of a batch have similar length.

    Rows are shuffled, sorted by length within windows of 16 batches, and the batches are
    shuffled; so padding is rare and every row still meets ever new company.

    Args:
        rows: numbers of rows, each of which comes once.
        lengths: of the whole table, indexed by row number.
        batch_size: of all batches but one, which has what is left over.
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
    """The rows from short to long, in batches of which the last may be smaller; no randomness."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    return [ordered[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def pad_batch(
    table: TokenTable,
    rows: Rows,
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> dict[str, Rows]:
    """Columns and ``attention_mask`` of shape (B, S), S the longest row's length, and ``labels``.

    Columns other than ``input_ids`` are padded with 0, as transformers pads token types.
    """
    lengths = table.lengths[rows]
    position = np.arange(lengths.max())
    start = np.zeros_like(lengths) if padding_side == "right" else lengths.max() - lengths
    within = position - start[:, None]
    mask = (within >= 0) & (within < lengths[:, None])
    tokens = (table.offsets[rows][:, None] + within)[mask]
    batch = {"attention_mask": mask.astype(np.int64), "labels": table.labels[rows]}
    for name, column in table.columns.items():
        batch[name] = np.full(mask.shape, pad_token_id if name == "input_ids" else 0, np.int64)
        batch[name][mask] = column[tokens]
    return batch
