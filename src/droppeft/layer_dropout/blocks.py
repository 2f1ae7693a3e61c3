"""Find a model's transformer blocks and bypass some of them, in place, for one forward.

Source: a deactivated layer's output is its input, as in DropPEFT (arXiv:2503.10217). Gating the
blocks' own ``forward`` is ours: taking entries out of the block list makes architectures that
look up settings by list position compute something else without an error.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from droppeft.errors import DroppeftError

BLOCK_PATHS: dict[str, str] = {
    "bert": "encoder.layer",
    "roberta": "encoder.layer",
    "xlm-roberta": "encoder.layer",
    # Also DeBERTa-v3. The optional convolution after block 0 belongs to the encoder, not to the
    # block: when block 0 is dropped it still runs, on block 0's input.
    "deberta-v2": "encoder.layer",
    "gpt2": "h",
    "llama": "layers",
}
"""Supported ``config.model_type``: where the block list lies below the base model."""


def find_blocks(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """Find the transformer blocks of a base model, a task model or either wrapped by peft.

    Args:
        model: a transformers model (``model.config`` names its architecture).

    Returns:
        The dotted name of the block list inside ``model`` and its L blocks, input first.

    Raises:
        DroppeftError: an architecture that is not in :data:`BLOCK_PATHS`, or a model whose block
            list is not where or not as long as its architecture says.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    path = BLOCK_PATHS.get(model_type or "")
    if path is None:
        raise DroppeftError(
            f"layer dropout does not know where the blocks of {type(model).__name__} "
            f"(model_type {model_type!r}) are; supported: {', '.join(BLOCK_PATHS)}"
        )
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{path}")
    ]
    if len(found) != 1:
        raise DroppeftError(
            f"a {model_type} model has one block list {path!r}, but {type(model).__name__} has "
            f"{len(found)}; load it with transformers' own classes"
        )
    [(name, blocks)] = found
    if len(blocks) != config.num_hidden_layers:
        raise DroppeftError(
            f"{type(model).__name__} has {len(blocks)} blocks in {name!r}, but its configuration "
            f"says {config.num_hidden_layers}; make num_hidden_layers and the blocks agree"
        )
    return name, tuple(blocks)


class Gates:
    """The gates of L blocks inside :func:`gated`; all open at first."""

    def __init__(self, num_layers: int) -> None:
        self._active = (True,) * num_layers
        self._executed = [0] * num_layers
        self._arity: dict[type[nn.Module], int | None] = {}

    @property
    def active(self) -> tuple[bool, ...]:
        """Which of the L blocks run in the next forward; assign L values to change it.

        A backward is not affected: recomputing a checkpointed block runs what its forward ran.
        """
        return self._active

    @active.setter
    def active(self, active: Iterable[bool]) -> None:
        chosen = tuple(active)
        if len(chosen) != len(self._executed):
            raise DroppeftError(
                f"{len(chosen)} gates were set for {len(self._executed)} blocks; set one per block"
            )
        self._active = chosen

    @property
    def executed(self) -> tuple[int, ...]:
        """How many forwards each of the L blocks ran since the last :meth:`reset_executed`."""
        return tuple(self._executed)

    def reset_executed(self) -> None:
        """Set all counts of :attr:`executed` to 0."""
        self._executed[:] = [0] * len(self._executed)


class _Gate:
    """Stands in for one block's ``forward``.

    It lies outside the wrapper with which transformers checkpoints a block (that is put on the
    class), so recomputation in the backward neither asks the gate again nor is counted.
    """

    def __init__(self, gates: Gates, index: int, block: nn.Module) -> None:
        self.gates = gates
        self.index = index
        self.kind = type(block)
        self.forward = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gates = self.gates
        if gates._active[self.index]:
            gates._executed[self.index] += 1
            output = self.forward(*args, **kwargs)
            if self.kind not in gates._arity:
                gates._arity[self.kind] = _arity(output)
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.kind not in gates._arity:
            gates._arity[self.kind] = _arity(self._probe(hidden, args, kwargs))
        arity = gates._arity[self.kind]
        return hidden if arity is None else (hidden, *[None] * (arity - 1))

    def _probe(self, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
        """Run a dropped block once to see what it returns; the run around it notices nothing."""
        with torch.no_grad(), torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
            return self.forward(*args, **kwargs)


def _arity(output: object) -> int | None:
    """Length of a returned tuple, ``None`` for a bare tensor."""
    return len(output) if isinstance(output, tuple) else None


@contextmanager
def gated(blocks: Iterable[nn.Module]) -> Iterator[Gates]:
    """Put a gate before each block; on leaving, the blocks are as they were.

    A dropped block returns the very tensor it got (in a tuple of the usual length where blocks
    return tuples) and costs nothing: no forward, no stored activation, no gradient. The module
    tree, parameter names and ``state_dict`` do not change. Once per context, if the first block
    asked is dropped, it is run without gradients to learn what blocks of its class return.
    Generate text outside: a dropped block adds nothing to a key-value cache.

    Args:
        blocks: the L blocks, as :func:`find_blocks` returns them.

    Yields:
        The gates; set ``gates.active`` before a forward.

    Raises:
        DroppeftError: a block that already has a gate, or is given twice.
    """
    blocks = tuple(blocks)
    _refuse_gated(blocks)
    gates = Gates(len(blocks))
    # A tool that moves weights between devices may already have put its own forward there.
    before = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        vars(block)["forward"] = _Gate(gates, index, block)
    try:
        yield gates
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


def _refuse_gated(blocks: tuple[nn.Module, ...]) -> None:
    if len(set(blocks)) < len(blocks):
        raise DroppeftError("the same block was given twice; give every block once")
    if any(isinstance(vars(block).get("forward"), _Gate) for block in blocks):
        raise DroppeftError("these blocks are gated already; leave the first `gated` before")
