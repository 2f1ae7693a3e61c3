"""Gradient checkpointing of blocks: the backward pass recomputes what the forward did not store.

Source: Chen et al. (arXiv:1604.06174), by the switch of transformers' blocks
(``GradientCheckpointingLayer``) and torch's non-reentrant ``checkpoint``.

Switching it on for each block is ours. Transformers' switch for a whole model also makes the
embeddings require a gradient. Non-reentrant checkpointing does not need this, and the backward pass
would then run through all layers below the lowest adapter. In addition, that switch makes some
models ignore the prefix of prefix tuning.
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
from droppeft.models.key_value_cache import set_temporarily


class Call(NamedTuple):
    """A forward pass of one block that the backward pass will run again.

    Attributes:
        block: the block.
        function: its forward pass, without gates and checkpointing, with its keyword arguments.
        inputs: the positional arguments of ``function``.
    """

    block: nn.Module
    function: partial[Any]
    inputs: tuple[Any, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors stored for recomputation, hidden states (B, S, H) first."""
        return list(_tensors((*self.inputs, *self.function.keywords.values())))


def check_checkpointing(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Check that transformers can checkpoint the blocks of a model.

    Raises:
        DroppeftError: it cannot.
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
    """Store only the inputs of each block inside the context, and recompute the rest.

    Values and gradients are bit for bit the same as without checkpointing (on the CPU), also with
    module dropout. Dropped blocks do not run. Every block that ran is run a second time. Blocks
    cannot fill a key-value cache inside, so
    :func:`droppeft.models.key_value_cache.without_cache` must be active. When the context is left,
    model and blocks are restored.

    Args:
        model: the model, with or without an adapter.
        blocks: its L layers, before they are gated.
        note: called at each forward pass of a block that has a backward pass.

    Raises:
        DroppeftError: see :func:`check_checkpointing`.
    """
    check_checkpointing(model, blocks)
    # A block that writes into a key-value cache must not run twice. A prefix is only read.
    reads_cache = isinstance(model, PrefixModel)
    with ExitStack() as undo:
        for block in blocks:
            undo.enter_context(set_temporarily(block, "gradient_checkpointing", True))
            undo.enter_context(set_temporarily(block, "_can_checkpoint_with_cache", reads_cache))
            run = partial(_checkpoint, block, block.training, note)
            undo.enter_context(set_temporarily(block, "_gradient_checkpointing_func", run))
            # transformers checkpoints blocks in training mode alone.
            undo.enter_context(set_temporarily(block, "training", True))
        yield


def _checkpoint(
    block: nn.Module,
    mode: bool,
    note: Callable[[Call], None],
    function: partial[Any],
    *inputs: Any,
) -> Any:
    own = partial(_run_in_mode, block, mode, function.func, *function.args, **function.keywords)
    if not torch.is_grad_enabled():  # nothing is stored, and there is no backward
        return own(*inputs)
    note(Call(block, own, inputs))
    return checkpoint(own, *inputs, use_reentrant=False)


def _run_in_mode(
    block: nn.Module, mode: bool, function: Callable[..., Any], *inputs: Any, **others: Any
) -> Any:
    with set_temporarily(block, "training", mode):
        return function(*inputs, **others)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | Cache):
        for item in value:
            yield from _tensors(item)
