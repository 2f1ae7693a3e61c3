"""What the tables of a configuration are made of."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict


def _words(value: object) -> object:
    """Let a list be written on the command line as ``a,b,c``."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


Whole = Annotated[int, Strict()]
"""An integer; unlike a plain one it does not take ``true`` for 1."""

Real = Annotated[float, Strict()]

WordList = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Table(BaseModel):
    """A frozen group of settings that refuses what it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )
