"""FLOPs and bytes of one training step, for each block.

Ours. :mod:`droppeft.costs.fake_step` counts them for a model; :mod:`droppeft.costs.modelled_clock`
converts them to a client's seconds.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCounts:
    """What one part of a model costs in one training step.

    Attributes:
        forward_flops: of its forward; a multiplication with an addition counts as two.
        backward_flops: of its backward, with the forward that checkpointing repeats.
        stored_bytes: what its forward saves for the backward, each storage counted once.
        weight_bytes: of all its parameters and buffers, in the precision in which they are stored.
        parameters: number of parameters, trainable ones included.
        trainable_parameters: number of those that belong to the adapter or the head.
    """

    forward_flops: int
    backward_flops: int
    stored_bytes: int
    weight_bytes: int
    parameters: int
    trainable_parameters: int

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class StepCounts:
    """What one training step of a model costs, at one batch and length.

    Attributes:
        batch: B, rows of a step.
        length: S, tokens of a row, padding included.
        blocks: the L layers, each counted as if it ran; a dropped one costs nothing.
        rest: embeddings, head and loss, which run in every step.
        passing_bytes: peak of temporary tensors, on top of what is stored for the backward.
    """

    batch: int
    length: int
    blocks: tuple[BlockCounts, ...]
    rest: BlockCounts
    passing_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of a step, padding included: batch times length."""
        return self.batch * self.length
