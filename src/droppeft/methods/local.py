"""Local: every client trains a personal adapter and shares nothing; a lower reference. Ours.

All clients begin with the same values, which their first instruction contains. There is no global
model: each client's model is evaluated on its own test rows.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.federated_method import (
    Method,
    Setup,
    evaluating,
    full_instruction,
    per_client,
    start_with,
    uniform_adapter,
)
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply
from droppeft.messages.server_state import ServerState
from droppeft.sharing.participation import (
    ParticipationMemory,
    last_participation,
    with_participations,
)


def _init(setup: Setup) -> ServerState:
    return replace(start_with(setup, uniform_adapter(setup)), memory=ParticipationMemory())


def _for_client(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    instruction = full_instruction(setup, state, round, client)
    last = last_participation(state, client)
    tensors = instruction.tensors if last is None else {}
    state_round = None if last is None else last.round
    return replace(instruction, tensors=tensors, share=frozenset(), state_round=state_round)


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    return with_participations(state, instructions, replies)


LOCAL = Method(
    name="local",
    summary="every client trains alone, nothing is shared: a lower reference",
    tables=frozenset({"frozen"}),
    init=_init,
    instruct=per_client(_for_client),
    merge=_merge,
    evaluate_client=evaluating(_for_client),
    has_global_model=lambda config: False,
    memory_type=ParticipationMemory,
)
