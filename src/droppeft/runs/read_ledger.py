"""Reading the ledger of a run, and checking that its rows are whole. Ours."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from droppeft.errors import DroppeftError
from droppeft.files import as_json_lines, write_atomically
from droppeft.runs.ledger import RoundRow

_ROUND_ROW = TypeAdapter(RoundRow)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a ledger, in which each row has a round; a missing file has no rows.

    A last line without its end, left by a crash, is ignored.

    Raises:
        DroppeftError: the file cannot be read, or another line is no row.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DroppeftError(f"{path}: cannot be read ({error}); put the file back") from None
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line, parse_constant=_refuse)
            is_row = isinstance(row, dict) and type(row.get("round")) is int
        except ValueError:
            is_row = False
        if not is_row:
            raise DroppeftError(
                f"{path}: line {number} is damaged; put the file back, or start a new run"
            )
        rows.append(row)
    return rows


def read_rounds(path: Path) -> list[RoundRow]:
    """Read ``rounds.jsonl``.

    Raises:
        DroppeftError: as :func:`read_rows`, or a row lacks a value or has one of another type.
    """
    return [_round_row(path, columns) for columns in read_rows(path)]


def read_ledger(rounds: Path, clients: Path, last_round: int) -> list[RoundRow]:
    """Read the rounds that are saved, and remove rows whose checkpoint was never written.

    Args:
        rounds, clients: the two files; nothing is written unless both are complete.
        last_round: of the checkpoint.

    Raises:
        DroppeftError: as :func:`read_rounds`, or a row of a round or of a client is missing.
    """
    kept, client_rows = (
        [row for row in read_rows(path) if row["round"] <= last_round] for path in (rounds, clients)
    )
    rows = [_round_row(rounds, columns) for columns in kept]
    if [row.round for row in rows] != [*range(1, last_round + 1)]:
        raise DroppeftError(
            f"{rounds} has {len(rows)} of the {last_round} rounds that are saved; put the file "
            "back, or start a new run"
        )
    _check_complete(rounds, clients, rows, client_rows)
    for path, content in ((rounds, kept), (clients, client_rows)):
        write_atomically(path, as_json_lines(content))
    return rows


def _check_complete(
    rounds: Path, clients: Path, rows: Sequence[RoundRow], client_rows: Sequence[Mapping[str, Any]]
) -> None:
    """Check that both files have the same clients in the same rounds."""
    found: dict[int, list[Any]] = {}
    for columns in client_rows:
        is_whole = isinstance(columns.get("accepted"), bool)
        client = columns.get("client") if is_whole else None
        found.setdefault(columns["round"], []).append(client)
    for row in rows:
        if found.get(row.round, []) != row.cohort:
            raise DroppeftError(
                f"{clients}: its rows of round {row.round} are not those of the clients that "
                f"{rounds.name} names ({_first_difference(found.get(row.round, []), row.cohort)}); "
                "put the file back, or start a new run"
            )


def _first_difference(found: Sequence[Any], expected: Sequence[int]) -> str:
    missing = [client for client in expected if client not in found]
    return f"client {missing[0]} is missing" if missing else f"it has {len(found)} rows"


def _round_row(path: Path, columns: Mapping[str, Any]) -> RoundRow:
    try:
        row = RoundRow.from_columns(columns)
        _ROUND_ROW.validate_json(json.dumps(vars(row)), strict=True)
    except KeyError as error:
        reason = f"lacks {error.args[0]}"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"has a wrong {first['loc'][0]} ({first['msg'].lower()})"
    else:
        return row
    raise DroppeftError(
        f"{path}: the row of round {columns['round']} {reason}; put the file back, or start a new "
        "run"
    )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")
