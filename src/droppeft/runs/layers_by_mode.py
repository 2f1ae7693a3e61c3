"""How many layers a step ran forward only, and how many it skipped. Ours."""

from collections.abc import Sequence

from droppeft.messages.instruction import Instruction
from droppeft.messages.reply import Reply, Update


def forward_and_skipped(
    instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> tuple[float | None, float | None]:
    """Return both numbers, mean over the steps of all updates; ``None`` without a step.

    With the layers that a step trained and the cached ones they add up to all layers. Clients
    report tokens, not steps: the layers that were not trained are divided between the two by their
    tokens.

    Args:
        instructions: of a round.
        replies: to them, in the same order; failures are ignored.
    """
    steps = idle = frozen = forward = skipped = 0
    for instruction, update in zip(instructions, replies, strict=True):
        if not isinstance(update, Update):
            continue
        first, cost = instruction.frozen, update.cost
        above = len(cost.layer_tokens) - first
        ran_forward = sum(cost.forward_tokens[first:])
        steps += update.steps
        idle += update.steps * above - sum(update.active_steps)
        frozen += update.steps * sum(tokens > 0 for tokens in cost.forward_tokens[:first])
        forward += ran_forward
        skipped += cost.tokens * above - sum(cost.layer_tokens[first:]) - ran_forward
    if not steps:
        return None, None
    part = forward / (forward + skipped) if forward else 0.0
    return (frozen + idle * part) / steps, idle * (1 - part) / steps
