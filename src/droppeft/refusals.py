"""Why a client does not run an instruction, as codes with numbers. Ours.

An error message can hold texts, paths and values of cells, so clients send none. They send the code
of a reason and its numbers, from which the server writes the sentence.
"""

from droppeft.errors import DroppeftError

REASONS = {
    "error": "it could not run its instruction; the log on its machine says why",
    "state_lost": "the state that it saved in round {0:.0f} is missing or damaged",
    "cannot_split": "its {0:.0f} rows of this task have too few different texts for rows to train, "
    "validate and test",
    "other_model": "its model differs from the server's",
    "other_tokenizer": "its tokenizer differs from the server's",
    "too_few_rows": "it has {0:.0f} rows of this task, and the fewest that it takes part with are "
    "{1:.0f}",
}
"""The sentence of each code, with places for its numbers."""


class Refused(DroppeftError):
    """A client does not run an instruction.

    Attributes:
        code: of the reason, a key of :data:`REASONS`.
        numbers: that fill the places of its sentence.
    """

    def __init__(self, code: str, *numbers: float) -> None:
        super().__init__(sentence(code, numbers))
        self.code = code
        self.numbers = numbers


def sentence(code: str, numbers: tuple[float, ...]) -> str:
    """Return the sentence of a code, without the client that it is about.

    Raises:
        ValueError: there is no such code, or it has another count of numbers.
    """
    try:
        text = REASONS[code].format(*numbers)
    except (KeyError, IndexError):
        raise ValueError(f"no reason {code} with {len(numbers)} numbers") from None
    return text
