"""Tokenise conversations and documents once, with a label for every token that is learnt. Ours."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from droppeft.data.conversations import ConversationTable, Message
from droppeft.data.rendering import EXCERPT, Rendered, render_prompts, render_rows
from droppeft.data.texts import Rows
from droppeft.data.tokens import BLOCK_ROWS, Ids, TokenRows, pad_columns
from droppeft.errors import DroppeftError

IGNORED = -100
"""Label of a token that is not learnt, as in transformers."""

PROMPT_SHARE = 4
"""A prompt keeps at least this fraction (one fourth) of ``max_length``, if it is that long."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedText(TokenRows):
    """Tokenised conversations or documents.

    Attributes:
        labels: ``input_ids`` where a token is learnt and -100 elsewhere, shape (tokens of all
            rows,). They are not shifted, as transformers takes them. The first token of a row has
            -100, since nothing predicts it.
        full_lengths: number of tokens of each row before truncation, shape (rows,).
        truncated_completions: number of rows that lost the end of what is learnt, not only a part
            of the prompt.
    """

    labels: Ids
    full_lengths: Rows
    truncated_completions: int

    @property
    def truncated(self) -> int:
        """Number of rows that were truncated."""
        return int(np.sum(self.full_lengths > self.lengths))

    @property
    def targets(self) -> Rows:
        """Number of tokens of each row that are learnt, at least 1, shape (rows,)."""
        learnt = np.concatenate([[0], np.cumsum(self.labels != IGNORED)])
        return np.diff(learnt[self.offsets])


def encode_conversations(
    table: ConversationTable,
    tokenizer: Any,
    max_length: int,
    loss_on: Literal["completion", "all"] = "completion",
) -> EncodedText:
    """Tokenise every row and truncate it to ``max_length`` tokens.

    A row that is too long first loses the middle of its prompt, which is all that precedes the
    first answer: instructions stand at its beginning or its end. If that is not enough, since the
    prompt keeps a fourth of ``max_length``, the row also loses its end. So every row has tokens
    that are learnt.

    The tokens of a prompt are those that the model sees in generation: where a token would reach
    from the prompt into the completion, the two are tokenised separately.

    Args:
        table: the rows.
        tokenizer: a fast tokenizer of transformers.
        max_length: largest number of tokens of a row, at least 4.
        loss_on: ``completion``: the messages of the assistant are learnt, with the token that ends
            a turn; ``all``: all tokens are. Documents are learnt as a whole.

    Raises:
        DroppeftError: the tokenizer is not fast, or as in
            :func:`~droppeft.data.rendering.render_rows`.
    """
    _check_fast(tokenizer)
    encoded = [
        _truncated(ids, learnt, max_length, loss_on)
        for start in range(0, len(table), BLOCK_ROWS)
        for ids, learnt in _encode_block(table.rows[start : start + BLOCK_ROWS], tokenizer)
    ]
    return EncodedText(
        columns={"input_ids": np.concatenate([row.ids for row in encoded])},
        offsets=np.cumsum([0, *(len(row.ids) for row in encoded)], dtype=np.int64),
        labels=np.concatenate([row.labels for row in encoded]),
        full_lengths=np.array([row.full_length for row in encoded], np.int64),
        truncated_completions=sum(row.lost_end for row in encoded),
    )


def encode_prompts(
    prompts: Sequence[Sequence[Message]], tokenizer: Any, max_length: int
) -> list[Ids]:
    """Tokenise the messages before an answer, with the assistant's header, for generation.

    A prompt of more than ``max_length`` tokens loses its middle.

    Raises:
        DroppeftError: as in :func:`encode_conversations`.
    """
    _check_fast(tokenizer)
    rendered = render_prompts(prompts, tokenizer)
    return [_without_middle(ids, max_length) for ids in _tokenise(rendered, tokenizer)]


def pad_encoded(
    table: EncodedText,
    rows: Rows,
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> dict[str, Rows]:
    """Return ``input_ids``, ``attention_mask`` and ``labels``, each of shape (B, S).

    S is the length of the longest row. Padding has the label -100, whatever its token.
    """
    return pad_columns(
        table,
        {**table.columns, "labels": table.labels},
        rows,
        {"input_ids": pad_token_id, "labels": IGNORED},
        padding_side,
    )


def _check_fast(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise DroppeftError(
            "the model's tokenizer has no fast version, which finds the tokens of a completion; "
            "use a model that has one (tokenizer.json)"
        )


# Tokens and what is learnt of them


def _encode_block(rows: Sequence[Any], tokenizer: Any) -> list[tuple[Ids, Mask]]:
    """Return the tokens of each row, and which of them are parts of what is learnt."""
    rendered = render_rows(rows, tokenizer)
    encoding = tokenizer(
        [row.text for row in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    encoded = []
    for number, row in enumerate(rendered):
        ids = np.array(encoding["input_ids"][number], np.int32)
        places = np.array(encoding["offset_mapping"][number], np.int64).reshape(-1, 2)
        if _separable(row, ids, places, tokenizer):
            learnt = np.zeros(len(ids), bool)
            for start, end in row.spans:
                learnt[slice(*np.searchsorted(places[:, 0], (start, end)))] = True
        else:
            ids, learnt = _in_pieces(row, tokenizer)
        if not learnt[1:].any():
            before = row.text[: row.spans[0][0]][-EXCERPT:]
            raise DroppeftError(
                f"the model's tokenizer finds no tokens in the completion after {before!r}; remove "
                "the row"
            )
        encoded.append((ids, learnt))
    return encoded


def _separable(row: Rendered, ids: Ids, places: Rows, tokenizer: Any) -> bool:
    """Whether the tokens before each border of what is learnt are those of that text alone."""
    for border in _borders(row):
        before = int(np.searchsorted(places[:, 0], border))
        if before and places[before - 1, 1] > border:
            return False
        if _white_space_at(row.text, border):
            # White space may join a token on the other side, and the tokenizer's offsets, which
            # may leave out white space, do not tell.
            [alone] = _tokenise([row.text[:border]], tokenizer)
            if not np.array_equal(ids[:before], alone):
                return False
    return True


def _borders(row: Rendered) -> list[int]:
    return sorted({border for span in row.spans for border in span} - {0, len(row.text)})


def _white_space_at(text: str, border: int) -> bool:
    """Whether white space meets a border; a single newline before it, as in ChatML, is a token."""
    before = text[max(border - 2, 0) : border]
    alone = before[-1:] == "\n" and not before[:-1].isspace()
    return text[border].isspace() or (before[-1:].isspace() and not alone)


def _in_pieces(row: Rendered, tokenizer: Any) -> tuple[Ids, Mask]:
    """Tokenise what is learnt and what is not separately."""
    borders = [0, *_borders(row), len(row.text)]
    pieces = list(pairwise(borders))
    tokens = _tokenise([row.text[start:end] for start, end in pieces], tokenizer)
    learnt = [any(start <= piece[0] < end for start, end in row.spans) for piece in pieces]
    return np.concatenate(tokens), np.repeat(learnt, [len(ids) for ids in tokens])


def _tokenise(texts: Iterable[str], tokenizer: Any) -> list[Ids]:
    texts = list(texts)
    if not texts:
        return []
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return [np.array(ids, np.int32) for ids in encoding["input_ids"]]


# Truncation


@dataclass(frozen=True)
class _Row:
    ids: Ids
    labels: Ids
    full_length: int
    lost_end: bool


def _truncated(ids: Ids, learnt: Mask, max_length: int, loss_on: str) -> _Row:
    prompt = int(np.argmax(learnt))
    least = min(prompt, max_length // PROMPT_SHARE)
    rest = min(len(ids) - prompt, max_length - least)
    labels = np.where(learnt | (loss_on == "all"), ids, IGNORED).astype(np.int32)
    labels[0] = IGNORED

    def cut(column: Ids) -> Ids:
        kept = _without_middle(column[:prompt], max_length - rest)
        return np.concatenate([kept, column[prompt : prompt + rest]])

    return _Row(cut(ids), cut(labels), len(ids), prompt + rest < len(ids))


def _without_middle(column: Ids, length: int) -> Ids:
    """Return the first and the last values, ``length`` in all; one more of the last."""
    if len(column) <= length:
        return column
    first = length // 2
    return np.concatenate([column[:first], column[len(column) - (length - first) :]])
