"""FFA-LoRA: LoRA's A keeps its initial values; only B and the head are trained and sent.

Source: arXiv:2403.12313. Since all clients have the same A, mean(B)·A equals mean(B·A), so that
averaging is exact. A is not sent, since clients compute it from the seed.
"""

from dataclasses import replace

from droppeft.adapters.tensor_names import LORA_A
from droppeft.federated_method import (
    Method,
    Setup,
    all_tensors,
    average_by_targets,
    evaluating,
    full_instruction,
    per_client,
)
from droppeft.messages.instruction import Instruction
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import flatten, restrict
from droppeft.methods.fedlora import FEDLORA


def _for_client(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    """The full instruction without A, which the client computes from the seed."""
    instruction = full_instruction(setup, state, round, client)
    names = frozenset(name for _, name, _ in flatten(instruction.tensors) if LORA_A not in name)
    return replace(
        instruction, tensors=restrict(instruction.tensors, names), train=names, share=names
    )


def _sent(state: ServerState) -> frozenset[str]:
    return frozenset(name for name in all_tensors(state) if LORA_A not in name)


FFA_LORA = Method(
    name="ffa_lora",
    summary="LoRA with A frozen: B and the head are trained and shared (FFA-LoRA)",
    tables=frozenset({"frozen", "server"}),
    init=FEDLORA.init,
    instruct=per_client(_for_client),
    merge=average_by_targets,
    lora_options=frozenset(),
    sent=_sent,
    evaluate_client=evaluating(_for_client),
)
