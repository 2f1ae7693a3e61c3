"""Assertions about error messages, which are one sentence on one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from droppeft.errors import DroppeftError


def assert_one_sentence(error: BaseException) -> None:
    """Check that the message is not empty and has one line."""
    assert str(error).strip()
    assert "\n" not in str(error)


@contextmanager
def or_refused(match: str) -> Iterator[None]:
    """Accept a DroppeftError that matches; the rest of the block is then skipped."""
    try:
        yield
    except DroppeftError as error:
        if not re.search(match, str(error)):
            raise
        assert_one_sentence(error)


@contextmanager
def refused(match: str) -> Iterator[pytest.ExceptionInfo[DroppeftError]]:
    """Expect a DroppeftError whose message is one line and matches."""
    with pytest.raises(DroppeftError, match=match) as found:
        yield found
    assert_one_sentence(found.value)
