"""Gradient checkpointing of blocks: the backward computes anew what the forward did not keep.

Source: Chen et al. (arXiv:1604.06174), through the switch that transformers' blocks have
(``GradientCheckpointingLayer``) and torch's non-reentrant ``checkpoint``. Switching on the blocks
alone is ours: transformers' switch for a whole model also makes the embeddings require a gradient,
which non-reentrant checkpointing does not need and for which the backward would go through every
layer below the lowest adapter, and has some models leave out a prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from droppeft.adapters.prefix import PrefixModel
from droppeft.errors import DroppeftError
from droppeft.models.key_value_cache import set_inside


class Call(NamedTuple):
    """A forward of one block that the backward will run again.

    Attributes:
        block: whose forward it is.
        function: what is called with ``inputs``; neither gates nor checkpoints.
        inputs: positional arguments; the named ones are in ``function``.
    """

    block: nn.Module
    function: partial[Any]
    inputs: tuple[Any, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is kept for running again: hidden states (B, S, H) first, masks, a prefix."""
        return list(_tensors((*self.inputs, *self.function.keywords.values())))


def check_checkpointing(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Refuse a model whose blocks have no switch.

    Raises:
        DroppeftError: naming the architecture.
    """
    if not all(isinstance(block, GradientCheckpointingLayer) for block in blocks):
        config: Any = model.config
        raise DroppeftError(
            f"training.checkpointing: transformers cannot checkpoint the layers of a "
            f"{config.model_type} model; set it to false"
        )


@contextmanager
def checkpointed(
    model: nn.Module, blocks: Sequence[nn.Module], note: Callable[[Call], None]
) -> Iterator[None]:
    """Keep only what each block is called with; on leaving, model and blocks are as they were.

    Values and gradients are the same bits as without (on the CPU), module dropout included. Only
    blocks in training mode are affected, and a block that a gate drops is never asked. Costs a
    second forward of the blocks that ran. A block cannot fill a key-value cache meanwhile, so be
    :func:`droppeft.models.key_value_cache.without_cache`.

    Args:
        model: with an adapter or without.
        blocks: its L layers, before they are gated.
        note: told of each forward of a block when it begins.

    Raises:
        DroppeftError: see :func:`check_checkpointing`.
    """
    check_checkpointing(model, blocks)
    # A block that writes into a key-value cache must not run twice. A prefix is only read.
    kept_cache = isinstance(model, PrefixModel)
    with ExitStack() as undo:
        for block in blocks:
            undo.enter_context(set_inside(block, "gradient_checkpointing", True))
            undo.enter_context(set_inside(block, "_can_checkpoint_with_cache", kept_cache))
            run = partial(_checkpoint, block, note)
            undo.enter_context(set_inside(block, "_gradient_checkpointing_func", run))
        yield


def _checkpoint(
    block: nn.Module, note: Callable[[Call], None], function: partial[Any], *inputs: Any
) -> Any:
    note(Call(block, function, inputs))
    return checkpoint(function, *inputs, use_reentrant=False)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | Cache):
        for item in value:
            yield from _tensors(item)
