"""Base class and field types of the configuration's tables."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict


def _split_at_commas(value: object) -> object:
    """Accept ``a,b,c`` for a list, as it is written on the command line."""
    return [text.strip() for text in value.split(",")] if isinstance(value, str) else value


Whole = Annotated[int, Strict()]
"""An integer; unlike with plain ``int``, ``true`` is not accepted for 1."""

Real = Annotated[float, Strict()]
"""A number; ``true`` and texts are not accepted."""

TextList = Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)]
"""A list of texts."""


class Table(BaseModel):
    """An immutable group of settings that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )
