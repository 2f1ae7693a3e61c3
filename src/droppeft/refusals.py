"""Why a client does not run an instruction, as codes with numbers. Ours.

An error message can hold texts, paths and values of cells, so clients send none. They send the code
of a reason and its numbers, from which the server writes the sentence. None says how many
rows have the task's classes: a server could publish any classes, and count their rows.
"""

import math
import re

from droppeft.errors import DroppeftError

STATE_LOST = "state_lost"
"""Code of a client that needs all tensors again."""

ERROR = "error"
"""Code of every error that has no code of its own."""

REASONS = {
    ERROR: "it could not run its instruction; the log on its machine (node.log) says why",
    "unreadable": "it cannot read its instruction; is droppeft the same on both sides?",
    STATE_LOST: "the state that it saved in round {0:.0f} is missing or damaged",
    "no_node_file": "it has no node file; start its SuperNode with --node-config "
    "'node-file=\"/PATH/node.toml\"'",
    "model_server": "the process that keeps its model ended, or could not be started; the log on "
    "its machine (node.log) says why",
    "other_client": "its node file says that it is client {0:.0f}, not {1:.0f}",
    "model_needed": "the server's model is no packaged one, so its node file must say where it has "
    "the model (model = ...)",
    "cannot_split": "its rows of this task have too few different texts to train, validate and "
    "test",
    "other_model": "its model has other weights than the server's",
    "other_tokenizer": "its model has another tokenizer than the server's",
    "other_task": "its rows are for another task (task in its node file)",
    "method": "its node file does not allow the method of this run (limits.methods)",
    "impossible": "its instruction has a value that no run has; the log on its machine (node.log) "
    "names it",
    "steps": "it is asked for {0:.0f} training steps, and its most are {1:.0f} (limits.steps)",
    "seconds": "its local training took longer than the {0:g} s that it gives (limits.seconds)",
    "disk": "it would have to store {0:.3g} MB, and gives {1:g} MB (limits.disk_mb)",
    "memory": "a batch would have {0:.0f} tokens, and its most are {1:.0f}",
    "head": "it does not send its head (send.head); set sharing.head=personal",
    "measurements": "it sends no measurements on its validation and test rows (send.measurements)",
    "few_measured": "it is asked for a measurement on {0:.0f} rows, and its fewest are {1:.0f}",
    "few_trained": "it is asked to train on {0:.0f} rows, and its fewest are {1:.0f}",
    "backbone": "its node file allows no method that changes the backbone (limits.methods)",
    "kept": "{0:.0f} of the tensors that it is asked for were kept earlier in this run",
    "sharing_grew": "it shared a fraction {0:g} of its layers in this run, and is asked for {1:g}",
    "too_few_rows": "it has fewer rows of this task than the {0:.0f} that it takes part with",
}
"""The sentence of each code, with places for its numbers."""

FOR_GOOD = frozenset(
    {
        *("too_few_rows", "cannot_split", "other_model", "other_tokenizer", "other_task"),
        *("model_needed", "method", "measurements", "few_measured"),
    }
)
"""Codes of clients that refuse the same measurement in every round of a run."""

MOST_NUMBER = 1e15
"""Largest absolute value of a number that is sent with a code."""

_PLACE = re.compile(r"\{(\d)[:}]")


class Refused(DroppeftError):
    """A client does not run an instruction.

    Attributes:
        code: of the reason, a key of :data:`REASONS`.
        numbers: that fill the places of its sentence.
    """

    def __init__(self, code: str, *numbers: float) -> None:
        super().__init__(sentence(code, numbers))
        self.code = code
        self.numbers = tuple(map(float, numbers))


def sentence(code: str, numbers: tuple[float, ...]) -> str:
    """Return the sentence of a code, without the client that it is about.

    Raises:
        ValueError: there is no such code, it has another count of numbers, or a number is too large
            or not finite.
    """
    places = {*_PLACE.findall(REASONS.get(code, ""))}
    if code not in REASONS or len(places) != len(numbers):
        raise ValueError(f"there is no such reason with {len(numbers)} numbers")
    if not all(math.isfinite(number) and abs(number) <= MOST_NUMBER for number in numbers):
        raise ValueError("a number of a reason is too large or not finite")
    return REASONS[code].format(*numbers)
