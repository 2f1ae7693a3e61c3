"""FedSA-LoRA: clients share LoRA's A and the head; B is personal.

Source: arXiv:2410.01463. B is never merged, so that there is no global model: each client's model
is evaluated on its own test rows. A client that has never trained has B = 0.
"""

from collections.abc import Sequence
from dataclasses import replace

from droppeft.adapters.tensor_names import LORA_B
from droppeft.federated_method import (
    Method,
    Setup,
    average_by_targets,
    evaluating,
    full_instruction,
    per_client,
    start_with,
    uniform_adapter,
)
from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import flatten, restrict
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
    shared = frozenset(name for _, name, _ in flatten(instruction.tensors) if LORA_B not in name)
    if last is None:
        return replace(instruction, share=shared)
    return replace(
        instruction,
        tensors=restrict(instruction.tensors, shared),
        share=shared,
        state_round=last.round,
    )


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    return with_participations(
        average_by_targets(setup, state, instructions, replies), instructions, replies
    )


FEDSA_LORA = Method(
    name="fedsa_lora",
    summary="LoRA's A and the head are shared, B is personal (FedSA-LoRA)",
    tables=frozenset({"frozen", "server"}),
    init=_init,
    instruct=per_client(_for_client),
    merge=_merge,
    lora_options=frozenset({"use_rslora"}),
    evaluate_client=evaluating(_for_client),
    has_global_model=lambda config: False,
    memory_type=ParticipationMemory,
)
