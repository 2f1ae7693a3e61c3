"""FedLoRA: LoRA in every layer at full depth; A and B are averaged separately, weighted by rows.

Source: FedIT (arXiv:2305.05644), with the classification tasks of FedPETuning (arXiv:2212.10025).

This is the shortest method and a template for new ones. A method is a
:class:`~droppeft.federated_method.Method` of three functions: ``init`` returns the server's state
before round 1, ``instruct`` returns one instruction for each client of a round's cohort, and
``merge`` returns the state after the clients' replies. Most methods change the instruction that
:func:`~droppeft.federated_method.full_instruction` returns, or merge in another way. A method's
``check`` refuses settings that the method cannot work with.
"""

from droppeft.federated_method import (
    Method,
    Setup,
    all_tensors,
    average_by_targets,
    full_instruction,
    per_client,
    start_with,
    uniform_adapter,
)
from droppeft.messages.server_state import ServerState


def _init(setup: Setup) -> ServerState:
    """The configured adapter in every layer, with fresh tensors."""
    return start_with(setup, uniform_adapter(setup))


FEDLORA = Method(
    name="fedlora",
    summary="LoRA in every layer, full depth, plain averaging (FedIT)",
    tables=frozenset({"frozen", "server"}),  # tables of optional settings that have an effect
    init=_init,
    instruct=per_client(full_instruction),
    merge=average_by_targets,
    sent=all_tensors,
)
