"""The other right answer in many cases: a refusal in one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from droppeft.errors import DroppeftError


def assert_one_sentence(error: BaseException) -> None:
    """What the command line would print on one line."""
    assert str(error).strip()
    assert "\n" not in str(error)


@contextmanager
def or_refused(match: str) -> Iterator[None]:
    """Leave the rest of this block out where such a sentence says why it cannot be done."""
    try:
        yield
    except DroppeftError as error:
        if not re.search(match, str(error)):
            raise
        assert_one_sentence(error)


@contextmanager
def refused(match: str) -> Iterator[None]:
    """What is inside must be refused, in one sentence that the regular expression finds."""
    with pytest.raises(DroppeftError, match=match) as found:
        yield
    assert_one_sentence(found.value)
