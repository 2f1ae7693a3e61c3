"""A federated method of your own: clients' values are merged by their median. Run it with Python.

The median is less sensitive to a few bad updates than the mean. docs/how_to/write_a_method.md
explains what a method is.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import droppeft
from droppeft.federated_method import Method, Setup
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import flatten
from droppeft.methods.fedlora import FEDLORA


def merge_by_median(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    """Return the next state of the server, from the replies to a round's instructions."""
    updates = [reply for reply in replies if isinstance(reply, Update)]
    if not updates:  # a client that failed has sent a Failure
        return state
    merged = {layer: dict(named) for layer, named in state.model.tensors.items()}
    for layer, name, value in flatten(state.model.tensors):
        sent = [update.tensors[layer][name] for update in updates]
        merged[layer][name] = np.median(sent, axis=0).astype(value.dtype)
    return replace(state, model=replace(state.model, tensors=merged))


MEDIAN = Method(
    name="median",
    summary="LoRA in every layer, merged by the median",
    tables=frozenset({"frozen"}),  # optional tables of settings that it reads
    init=FEDLORA.init,
    instruct=FEDLORA.instruct,
    merge=merge_by_median,
)

if __name__ == "__main__":
    print(droppeft.run(method=MEDIAN, rounds=3))
