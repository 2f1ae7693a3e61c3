"""Gates before the transformer blocks of a model, which say what each block does in a forward.

Source: the output of a dropped layer is its input, as in DropPEFT (arXiv:2503.10217). Replacing the
``forward`` of each block is ours. Removing blocks from their list would silently change the results
of architectures that look up settings by position in the list.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.architectures import (
    BLOCK_OUTPUTS,
    DROPPED_OUTPUTS,
    Arguments,
    cache_of,
    hidden_of,
    with_hidden,
)
from droppeft.layer_dropout.attentions import add_missing_attentions
from droppeft.layer_dropout.decisions import Decisions
from droppeft.layer_dropout.modes import Mode, Modes, skipping
from droppeft.layer_dropout.module_attributes import attributes_set
from droppeft.layer_dropout.stacks import class_names, uncompiled


class Gates:
    """The gates of L blocks inside :func:`gated`. At first every block is trained."""

    def __init__(self, num_layers: int) -> None:
        self._modes: Modes = (Mode.TRAIN,) * num_layers
        self._executed = [0] * num_layers
        self.replacements: dict[int, torch.Tensor] = {}
        """By block index, the hidden states that a block which does not run returns instead of its
        input, in the input's data type."""
        self.always_open: Callable[[nn.Module], bool] | None = None
        """Called with a block before its forward; if it returns True, the block runs as in a model
        without gates."""
        self._arity: dict[type[nn.Module], int | None] = {}

    @property
    def modes(self) -> Modes:
        """The modes of the L blocks in the next forward. Assign L values to change them.

        A block in mode ``FORWARD`` runs without gradients, so no block below it can be trained. The
        backward is not affected: checkpointed blocks are recomputed as their forward ran them.

        Raises:
            DroppeftError: when they are assigned, if there is not one per block, or if a block is
                to be trained below one that runs forward only.
        """
        return self._modes

    @modes.setter
    def modes(self, modes: Iterable[Mode]) -> None:
        chosen = tuple(modes)
        if len(chosen) != len(self._executed):
            raise DroppeftError(
                f"{len(chosen)} gates were set for {len(self._executed)} blocks; set one per block"
            )
        forward = [layer for layer, mode in enumerate(chosen) if mode is Mode.FORWARD]
        if forward and Mode.TRAIN in chosen[: forward[-1]]:
            raise DroppeftError(
                f"block {chosen.index(Mode.TRAIN)} cannot be trained below block {forward[-1]}, "
                "which runs forward only, so that no gradient would reach it; train the last blocks"
            )
        self._modes = chosen

    @property
    def active(self) -> tuple[bool, ...]:
        """L gates; True for a block that runs in the next forward.

        Assign L truth values to train the blocks that are True and skip the others.
        """
        return tuple(mode in _RUNNING for mode in self._modes)

    @active.setter
    def active(self, active: Iterable[bool]) -> None:
        self.modes = skipping(active)

    @property
    def executed(self) -> tuple[int, ...]:
        """Number of forwards that each of the L blocks ran since :meth:`reset_executed`."""
        return tuple(self._executed)

    def reset_executed(self) -> None:
        """Set all counts in :attr:`executed` to 0."""
        self._executed[:] = [0] * len(self._executed)

    def mode_of(self, index: int, block: nn.Module) -> Mode:
        """Return the mode of a block if a forward reaches it now."""
        if self.always_open is not None and self.always_open(block):
            return Mode.TRAIN
        return self._modes[index]


_RUNNING = (Mode.TRAIN, Mode.FORWARD)
"""Modes in which a block runs."""


class _Gate:
    """Replacement for the ``forward`` of one block.

    It wraps the function with which transformers checkpoints the block (which is part of the
    block's class). That recomputation neither uses the gate nor is counted. If several blocks are
    checkpointed together, the recomputation calls the gate again, which repeats its decision.
    """

    def __init__(self, gates: Gates, index: int, block: nn.Module) -> None:
        self.gates = gates
        self.index = index
        self.block = uncompiled(block)
        self.forward = block.forward
        self.decide = never_compiled(Decisions().decide)
        self.add_missing_attentions = never_compiled(add_missing_attentions)
        self.forward_only = untraced(self._forward_only)
        self.dropped_output = _known_output(block)
        self.incomplete_cache: weakref.ref[Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gates = self.gates
        if self.incomplete_cache is not None:
            self._check_cache(cache_of((args, kwargs)))
        mode = self.decide(partial(gates.mode_of, self.index, self.block))
        if mode in _RUNNING:
            gates._executed[self.index] += 1
            run = self.forward_only if mode is Mode.FORWARD else self.forward
            output = run(*args, **kwargs)
            if self.dropped_output is None:
                gates._arity[type(self.block)] = _arity(output)
            return output
        self.add_missing_attentions(self.block)
        return self._dropped((args, kwargs))

    def _forward_only(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block without gradients.

        If its input requires a gradient, its output is made to require one as well, with nothing
        behind it: a reentrant checkpoint has no gradients if its inputs require none.
        """
        wanted = torch.is_grad_enabled() and hidden_of((args, kwargs)).requires_grad
        with torch.no_grad(), _no_autocast_cache():
            output = self.forward(*args, **kwargs)
        if wanted:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.requires_grad_()
        return output

    def _dropped(self, call: Arguments) -> Any:
        cache = cache_of(call)
        if cache is not None:
            self.incomplete_cache = weakref.ref(cache)
        replacement = self.gates.replacements.get(self.index)
        if replacement is not None:
            call = with_hidden(call, replacement.to(hidden_of(call).dtype))
        if self.dropped_output is not None:
            return self.dropped_output(self.block, call)
        kind, hidden = type(self.block), hidden_of(call)
        if kind not in self.gates._arity:
            self.gates._arity[kind] = _arity(self._probe(hidden, call))
        arity = self.gates._arity[kind]
        return hidden if arity is None else (hidden, *[None] * (arity - 1))

    def _check_cache(self, cache: object) -> None:
        """Refuse to continue a text with the cache of a forward in which the block was dropped."""
        known = self.incomplete_cache
        if cache is not None and known is not None and known() is cache:
            raise DroppeftError(
                f"block {self.index} was dropped in an earlier part of this text, so its keys and "
                "values are missing from the cache; generate in evaluation mode, outside `gated`, "
                "with all gates open, or with use_cache=False"
            )

    def _probe(self, hidden: torch.Tensor, call: Arguments) -> Any:
        """Run a dropped block once, without side effects, to see what it returns."""
        args, kwargs = call
        with torch.no_grad(), torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
            return self.forward(*args, **kwargs)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Let autocast keep no copy of a weight that it casts.

    A copy that is made without gradients would have none in a later block that shares the weight.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


# torch.compile must not trace a gate: it would compile a graph for every pattern of dropped blocks,
# and give up after eight of them. With untraced gates it compiles the code between them.
untraced = partial(
    torch.compiler.disable,
    recursive=False,
    reason="a gate decides in every step whether its block runs; compile without fullgraph=True",
)

# What a gate calls, except for its block: compiled, it would repeat the decision of one forward.
never_compiled = partial(torch.compiler.disable, recursive=True)


def _known_output(block: nn.Module) -> Callable[[nn.Module, Arguments], Any] | None:
    for name in class_names(block):
        if name in BLOCK_OUTPUTS:
            return DROPPED_OUTPUTS[BLOCK_OUTPUTS[name]]
    return None


def _arity(output: object) -> int | None:
    """Return the length of an output tuple, or ``None`` for a tensor."""
    return len(output) if isinstance(output, tuple) else None


@contextmanager
def gated(blocks: Iterable[nn.Module]) -> Iterator[Gates]:
    """Install a gate before each block, and remove all gates on exit.

    A dropped block returns its input tensor (in a tuple if its class returns one) at no cost:
    without a forward, stored activations or gradients. The module tree, the parameter names and the
    ``state_dict`` do not change. A dropped block adds nothing to a key-value cache. Continuing a
    text with such a cache is refused, so generate outside the context or with ``use_cache=False``.
    Its attention weights are ``None`` in the output of the model. Router logits are those of the
    blocks that ran, over which the auxiliary loss of a mixture of experts is computed.

    The decision of each forward is stored. If the backward recomputes several blocks together
    (``torch.utils.checkpoint`` of either kind), it repeats the decisions of their forward, whatever
    has run since. Both forward and backward must be inside the context. If the model drops layers
    by itself (``config.layerdrop``), this is not changed here, but by :func:`layer_dropout`.

    Copies and pickles of a gated model (``copy.deepcopy``, ``AveragedModel``, ``torch.save``) have
    no gates: every block of a copy runs, with the copy's weights.

    ``torch.compile`` breaks its graph at the gates. It compiles the blocks and the code between
    them, and does not recompile when gates change.

    Args:
        blocks: the L blocks, as :func:`find_blocks` returns them. Blocks whose class is not in
            :data:`~droppeft.layer_dropout.architectures.ARCHITECTURES` are accepted too, provided
            that hidden states are their first argument and first output, and that later blocks need
            nothing else from them. If such a block is dropped before any block of its class has
            run, it is run once without gradients to find the length of the tuple it returns.

    Yields:
        A :class:`Gates`. Set its ``active`` or its ``modes`` before a forward.

    Raises:
        DroppeftError: if a block already has a gate, or is given twice; inside the context, if
            ``DataParallel`` copies a block.
    """
    blocks = tuple(blocks)
    _check_not_gated(blocks)
    gates = Gates(len(blocks))
    with ExitStack() as undo:
        for index, block in enumerate(blocks):
            forward = untraced(_Gate(gates, index, block).__call__)
            undo.enter_context(
                attributes_set(
                    block, forward=forward, _replicate_for_data_parallel=_refuse_data_parallel
                )
            )
        yield gates


def _refuse_data_parallel() -> None:
    raise DroppeftError(
        "layers cannot be dropped in the copies of a model that DataParallel makes; use "
        "DistributedDataParallel, with one process per GPU"
    )


def _check_not_gated(blocks: tuple[nn.Module, ...]) -> None:
    if len(set(blocks)) < len(blocks):
        raise DroppeftError("the same block was given twice; give every block once")
    if any(map(_is_gated, blocks)):
        raise DroppeftError("a block is gated already; leave the other `gated` context first")


def _is_gated(block: nn.Module) -> bool:
    gate = getattr(vars(block).get("forward"), "__wrapped__", None)
    return isinstance(getattr(gate, "__self__", None), _Gate)
