"""FedLoRA: LoRA in every layer at full depth, A and B averaged separately, weighted by rows.

Source: FedIT (arXiv:2305.05644), with the classification setting of FedPETuning.
"""

from droppeft.federated_method import (
    Method,
    Setup,
    average_by_examples,
    for_each,
    full_instruction,
    start_with,
    uniform_adapter,
)
from droppeft.messages import ServerState


def _init(setup: Setup) -> ServerState:
    return start_with(setup, uniform_adapter(setup))


FEDLORA = Method(
    name="fedlora",
    summary="LoRA in every layer, full depth, plain averaging (FedIT)",
    tables=frozenset({"frozen", "server"}),
    init=_init,
    instruct=for_each(full_instruction),
    merge=average_by_examples,
)
