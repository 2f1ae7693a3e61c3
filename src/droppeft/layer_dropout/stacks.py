"""Find the transformer blocks of a model. Ours."""

from operator import attrgetter
from typing import Any

from torch import nn

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.architectures import ARCHITECTURES, REFUSED, Architecture


def find_blocks(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """Find the transformer blocks of a model that has one list of them.

    Args:
        model: a transformers model, with or without a head, wrapped by peft or not.
            ``model.config`` names its architecture.

    Returns:
        The dotted name of the list of blocks inside ``model``, and its L blocks, input first.

    Raises:
        DroppeftError: as :func:`find_stacks`, or if the model has an encoder and a decoder.
    """
    stacks = find_stacks(model)
    if len(stacks) > 1:
        raise DroppeftError(
            f"{type(model).__name__} has {len(stacks)} lists of blocks ({', '.join(stacks)}), but "
            "one is needed here; use a model with one list, or call find_stacks instead"
        )
    [found] = stacks.items()
    return found


def find_stacks(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Find all lists of transformer blocks of a model, such as an encoder's and a decoder's.

    Args:
        model: a transformers model, as for :func:`find_blocks`.

    Returns:
        By dotted name of the list inside ``model``, its blocks, input first. The encoder comes
        first. To gate all blocks, use
        ``gated([block for blocks in stacks.values() for block in blocks])``.

    Raises:
        DroppeftError: if the architecture is not in ``ARCHITECTURES``, or if the place, length or
            block class of a list is not the one of the architecture.
    """
    config: Any = getattr(model, "config", None)
    if config is None and isinstance(getattr(model, "module", None), nn.Module):
        raise DroppeftError(
            f"{type(model).__name__} wraps a model; pass the model itself, which is its `module`"
        )
    architecture = _architecture(model, getattr(config, "model_type", None) or "")
    stacks: dict[str, tuple[nn.Module, ...]] = {}
    for path, depth in architecture.stacks.items():
        for name, blocks in _lists(model, path):
            _check_depth(model, name, blocks, depth)
            _check_classes(model, name, blocks, architecture)
            stacks[name] = tuple(blocks)
    if not stacks:
        raise DroppeftError(
            f"{type(model).__name__} has no list of blocks {_paths(architecture)}, as a "
            f"{config.model_type} model should; load it with transformers' own classes"
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
            f"{model_type!r}) are; docs/reference/architectures.md lists the {len(ARCHITECTURES)} "
            "supported types and says how to add one"
        )
    return ARCHITECTURES[model_type]


def _lists(model: nn.Module, path: str) -> list[tuple[str, nn.ModuleList]]:
    """Return the list whose name ends with ``path``, if any: a task may need no decoder."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{path}")
    ]
    if len(found) > 1:
        raise DroppeftError(
            f"{type(model).__name__} has {len(found)} lists of blocks {path!r} instead of one; "
            "load it with transformers' own classes"
        )
    return found


def _check_depth(model: nn.Module, name: str, blocks: nn.ModuleList, depth: str) -> None:
    expected = attrgetter(depth)(model.config)
    if len(blocks) != expected:
        raise DroppeftError(
            f"{type(model).__name__} has {len(blocks)} blocks in {name!r}, but its configuration "
            f"says {expected}; set {depth} to the number of blocks"
        )


def _check_classes(
    model: nn.Module, name: str, blocks: nn.ModuleList, architecture: Architecture
) -> None:
    """Refuse blocks of other classes: what they return and expect is not known."""
    if any(type(block).__name__ == "FullyShardedDataParallel" for block in blocks):
        raise DroppeftError(
            "layers of a model in FullyShardedDataParallel cannot be dropped; use its successor, "
            "torch.distributed.fsdp.fully_shard"
        )
    for index, block in enumerate(blocks):
        if not set(architecture.blocks).intersection(class_names(block)):
            raise DroppeftError(
                f"block {index} of {name!r} in {type(model).__name__} is of class "
                f"{type(block).__name__}, not {' or '.join(architecture.blocks)}; load it with "
                "transformers' own classes"
            )


def class_names(block: nn.Module) -> tuple[str, ...]:
    """Return the names of a block's class and of its base classes."""
    return tuple(kind.__name__ for kind in type(uncompiled(block)).__mro__)


def uncompiled(block: nn.Module) -> nn.Module:
    """Return the block itself if it was wrapped by ``torch.compile(block)``."""
    inner: nn.Module = getattr(block, "_orig_mod", block)
    return inner


def _paths(architecture: Architecture) -> str:
    return " or ".join(map(repr, architecture.stacks))
