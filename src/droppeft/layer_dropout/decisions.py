"""Repeat the decision of a forward when the backward recomputes it; ours.

``torch.utils.checkpoint`` runs a function a second time in the backward, and does not say for which
forward. But each node of the autograd graph has a sequence number, which counts the nodes of a
thread in the order of their creation. The node whose backward asks for the recomputation therefore
lies between the forward that created it and the next one.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.modes import Mode

# Not part of torch's stubs.
_next_node: Callable[[], int] = vars(torch.autograd)["_get_sequence_nr"]

KEPT = 1024
"""Number of changes of a decision that are remembered."""


@dataclass
class _Period:
    """Consecutive forwards with the same decision, by the numbers of the next node at each."""

    first: int
    last: int
    decision: Mode


class Decisions:
    """The decisions of one gate in its forwards, which run in one thread."""

    def __init__(self) -> None:
        self._periods: deque[_Period] = deque(maxlen=KEPT)
        self._thread = threading.get_ident()

    def decide(self, choose: Callable[[], Mode]) -> Mode:
        """Return the decision of the forward that is recomputed, or choose one for a new forward.

        A forward that a hook starts during the backward counts as a recomputation. This is right
        for losses that compute their gradients in this way (GradCache, arXiv:2101.06983).

        Raises:
            DroppeftError: nested reentrant checkpoints whose backward has a thread of its own.
        """
        node, thread = _node_in_backward(), threading.get_ident()
        found = None if node is None else self._find(node)
        decision = choose() if found is None else found
        # On a GPU, the backward has a thread of its own, which numbers its nodes by itself.
        if node is None and thread != self._thread:
            self._thread = thread
            self._periods.clear()
        if thread == self._thread:
            self._note(decision)
        return decision

    def _note(self, decision: Mode) -> None:
        number: int = _next_node()
        latest = self._periods[-1] if self._periods else None
        if latest is not None and latest.decision == decision:
            latest.last = number
        else:
            self._periods.append(_Period(number, number, decision))

    def _find(self, node: Any) -> Mode | None:
        """Return the decision of the forward to which a node belongs; ``None`` if not known."""
        number = node._sequence_nr()
        if "Checkpoint" in type(node).__name__:
            # Reentrant: the node was created just before the forward of the blocks.
            if threading.get_ident() != self._thread and _recomputations_under_way() > 1:
                raise DroppeftError(
                    "layer dropout does not know for which forward it recomputes blocks of nested "
                    "checkpoints on a GPU; use checkpoint(..., use_reentrant=False)"
                )
            after = (period for period in self._periods if period.last > number)
            return next((period.decision for period in after), None)
        # Non-reentrant: the node was created by the recomputed function itself.
        before = (period for period in reversed(self._periods) if period.first <= number)
        return next((period.decision for period in before), None)


def _recomputations_under_way() -> int:
    """Return how many reentrant checkpoints this thread is recomputing, one within another."""
    frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
    return sum(code is CheckpointFunction.backward.__code__ for code in frames)


def _node_in_backward() -> Any:
    """Return the node whose backward is running, or ``None`` outside of a backward."""
    return torch._C._current_autograd_node()
