"""Ditto: FedLoRA, and each client also trains a personal adapter, pulled to the shared one.

Source: arXiv:2012.04221. A client trains the shared adapter first, then the personal adapter on
the same batches. Personalised accuracy is that of the personal adapter; a client that has never
trained uses the shared one.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.federated_method import (
    Method,
    Setup,
    average_by_targets,
    evaluation_only,
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
    last = last_participation(state, client)
    return replace(
        full_instruction(setup, state, round, client),
        state_round=None if last is None else last.round,
        personal_adapter=setup.config.ditto.pull,
    )


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    return with_participations(
        average_by_targets(setup, state, instructions, replies), instructions, replies
    )


def _evaluate_client(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    instruction = _for_client(setup, state, round, client)
    return evaluation_only(
        instruction if instruction.state_round is None else replace(instruction, tensors={})
    )


DITTO = Method(
    name="ditto",
    summary="FedLoRA, and a personal adapter per client, pulled to the shared one (Ditto)",
    tables=frozenset({"ditto", "server"}),
    init=_init,
    instruct=per_client(_for_client),
    merge=_merge,
    evaluate_client=_evaluate_client,
    memory_type=ParticipationMemory,
)
