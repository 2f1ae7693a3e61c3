"""Find a model's transformer blocks and bypass some of them, in place, for one forward.

Source: a deactivated layer's output is its input, as in DropPEFT (arXiv:2503.10217). Gating the
blocks' own ``forward`` is ours: taking entries out of the block list makes architectures that
look up settings by list position compute something else without an error.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.architectures import (
    ANSWERS,
    ARCHITECTURES,
    BLOCK_ANSWERS,
    REFUSED,
    Architecture,
    Arguments,
    cache_of,
    hidden_of,
    with_hidden,
)


def find_blocks(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """Find the transformer blocks of a base model, a task model or either wrapped by peft.

    Args:
        model: a transformers model with one list of blocks (``model.config`` names its
            architecture).

    Returns:
        The dotted name of the block list inside ``model`` and its L blocks, input first.

    Raises:
        DroppeftError: as :func:`find_stacks`, and for a model with an encoder and a decoder.
    """
    stacks = find_stacks(model)
    if len(stacks) > 1:
        raise DroppeftError(
            f"{type(model).__name__} has {len(stacks)} lists of blocks ({', '.join(stacks)}), but "
            "one is needed here; use a model with one, or find_stacks in a loop of your own"
        )
    [found] = stacks.items()
    return found


def find_stacks(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Find all lists of transformer blocks: an encoder's and a decoder's where there are both.

    Args:
        model: a transformers model, as for :func:`find_blocks`.

    Returns:
        The dotted name of every list inside ``model`` and its blocks, input first, encoder first.
        Gate all of them by ``gated([block for blocks in stacks.values() for block in blocks])``.

    Raises:
        DroppeftError: an architecture that is not in ``ARCHITECTURES``, or a model whose lists
            are not where, not as long or not of what its architecture says.
    """
    config: Any = getattr(model, "config", None)
    architecture = _architecture(model, getattr(config, "model_type", None) or "")
    stacks: dict[str, tuple[nn.Module, ...]] = {}
    for path, depth in architecture.stacks.items():
        for name, blocks in _lists(model, path):
            _check_depth(model, name, blocks, depth)
            _check_classes(model, name, blocks, architecture)
            stacks[name] = tuple(blocks)
    if not stacks:
        raise DroppeftError(
            f"a {config.model_type} model has a list of blocks {_paths(architecture)}, but "
            f"{type(model).__name__} has 0; load it with transformers' own classes"
        )
    return stacks


def _architecture(model: nn.Module, model_type: str) -> Architecture:
    if model_type in REFUSED:
        raise DroppeftError(
            f"layers of {model_type} models cannot be dropped: {REFUSED[model_type]}"
        )
    if model_type not in ARCHITECTURES:
        raise DroppeftError(
            f"layer dropout does not know where the blocks of {type(model).__name__} (model_type "
            f"{model_type!r}) are; it knows the {len(ARCHITECTURES)} types of "
            "docs/architectures.md, which says how one is added"
        )
    return ARCHITECTURES[model_type]


def _lists(model: nn.Module, path: str) -> list[tuple[str, nn.ModuleList]]:
    """Lists whose name ends with ``path``: one at most (a task may need no decoder)."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{path}")
    ]
    if len(found) > 1:
        raise DroppeftError(
            f"there is one list of blocks {path!r} in this architecture, but "
            f"{type(model).__name__} has {len(found)}; load it with transformers' own classes"
        )
    return found


def _check_depth(model: nn.Module, name: str, blocks: nn.ModuleList, depth: str) -> None:
    expected = attrgetter(depth)(model.config)
    if len(blocks) != expected:
        raise DroppeftError(
            f"{type(model).__name__} has {len(blocks)} blocks in {name!r}, but its configuration "
            f"says {expected}; make {depth} and the blocks agree"
        )


def _check_classes(
    model: nn.Module, name: str, blocks: nn.ModuleList, architecture: Architecture
) -> None:
    """What another class returns, or expects of those before it, is unknown."""
    for index, block in enumerate(blocks):
        if not set(architecture.blocks).intersection(_class_names(block)):
            raise DroppeftError(
                f"block {index} of {name!r} in {type(model).__name__} is of class "
                f"{type(block).__name__}, not {' or '.join(architecture.blocks)}; load it with "
                "transformers' own classes"
            )


def _class_names(block: nn.Module) -> tuple[str, ...]:
    return tuple(kind.__name__ for kind in type(_uncompiled(block)).__mro__)


def _uncompiled(block: nn.Module) -> nn.Module:
    """``torch.compile(block)`` is another module, with the block inside."""
    inner: nn.Module = getattr(block, "_orig_mod", block)
    return inner


def _paths(architecture: Architecture) -> str:
    return " or ".join(map(repr, architecture.stacks))


class Gates:
    """The gates of L blocks inside :func:`gated`; all open at first."""

    def __init__(self, num_layers: int) -> None:
        self._active = (True,) * num_layers
        self._executed = [0] * num_layers
        self.stand_ins: dict[int, torch.Tensor] = {}
        """By block: what it hands on instead of its input while it is dropped."""
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
        self.block = _uncompiled(block)
        self.forward = block.forward
        self.answer = _known_answer(block)
        self.missed: weakref.ref[Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gates = self.gates
        if self.missed is not None:
            self._refuse_a_gap(cache_of((args, kwargs)))
        if gates._active[self.index]:
            gates._executed[self.index] += 1
            output = self.forward(*args, **kwargs)
            if self.answer is None:
                gates._arity[type(self.block)] = _arity(output)
            return output
        return self._dropped((args, kwargs))

    def _dropped(self, call: Arguments) -> Any:
        cache = cache_of(call)
        if cache is not None:
            self.missed = weakref.ref(cache)
        stand_in = self.gates.stand_ins.get(self.index)
        if stand_in is not None:
            call = with_hidden(call, stand_in)
        if self.answer is not None:
            return self.answer(self.block, call)
        kind, hidden = type(self.block), hidden_of(call)
        if kind not in self.gates._arity:
            self.gates._arity[kind] = _arity(self._probe(hidden, call))
        arity = self.gates._arity[kind]
        return hidden if arity is None else (hidden, *[None] * (arity - 1))

    def _refuse_a_gap(self, cache: object) -> None:
        """The same cache in a second forward means that a text is continued."""
        if cache is not None and self.missed is not None and self.missed() is cache:
            raise DroppeftError(
                f"block {self.index} was dropped in an earlier part of this text, so its keys and "
                "values are missing from the cache; generate outside of `gated`, with all gates "
                "open, or with use_cache=False"
            )

    def _probe(self, hidden: torch.Tensor, call: Arguments) -> Any:
        """Run a dropped block once to see what it returns; the run around it notices nothing."""
        args, kwargs = call
        with torch.no_grad(), torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
            return self.forward(*args, **kwargs)


# torch.compile must not look into a gate: every pattern of dropped blocks would be a graph of its
# own, and after eight of them it gives up. As it is, it compiles what lies between the gates.
untraced = partial(
    torch.compiler.disable,
    recursive=False,
    reason="a gate chooses in every step whether its block runs; compile without fullgraph=True",
)


def _known_answer(block: nn.Module) -> Callable[[nn.Module, Arguments], Any] | None:
    for name in _class_names(block):
        if name in BLOCK_ANSWERS:
            return ANSWERS[BLOCK_ANSWERS[name]]
    return None


def _arity(output: object) -> int | None:
    """Length of a returned tuple, ``None`` for a bare tensor."""
    return len(output) if isinstance(output, tuple) else None


@contextmanager
def gated(blocks: Iterable[nn.Module]) -> Iterator[Gates]:
    """Put a gate before each block; on leaving, the blocks are as they were.

    A dropped block returns the very tensor it got (in a tuple where its class returns one) and
    costs nothing: no forward, no stored activation, no gradient. The module tree, parameter names
    and ``state_dict`` do not change. A dropped block adds nothing to a key-value cache: going on
    with such a cache is refused, so generate outside, or with ``use_cache=False``.

    ``torch.compile`` stops at gates, whatever it was given: it compiles blocks and what lies
    between them, and nothing anew when gates change.

    Args:
        blocks: the L blocks, as :func:`find_blocks` returns them. Blocks of a class that is not
            in :data:`~droppeft.layer_dropout.architectures.ARCHITECTURES` may be given too, if
            hidden states are their first argument and result and no later block needs more than
            that: once per context, if the first of them asked is dropped, it is run without
            gradients to learn how long a tuple blocks of its class return.

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
        vars(block)["forward"] = untraced(_Gate(gates, index, block).__call__)
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
    if any(map(_is_gated, blocks)):
        raise DroppeftError("these blocks are gated already; leave the first `gated` before")


def _is_gated(block: nn.Module) -> bool:
    gate = getattr(vars(block).get("forward"), "__wrapped__", None)
    return isinstance(getattr(gate, "__self__", None), _Gate)
