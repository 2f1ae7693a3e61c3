"""Count a training step from a configuration alone: the model is executed without any values.

Ours; the tensors are torch's fake ones, which have a shape, a type and a device but no memory. No
formula per architecture can be wrong: what is counted is the code that trains.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import Parameters, trainable_by_layer
from droppeft.costs.operation_counter import OperationCounter, Region, watched
from droppeft.costs.quantized_stubs import QuantizedStub, kept_bytes, with_stand_ins
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks, gated
from droppeft.messages import AdapterSpec
from droppeft.models.key_value_cache import without_cache
from droppeft.models.loading import quiet, token_inputs
from droppeft.models.precision import autocast
from droppeft.tasks.classification import Batch, Classification
from droppeft.training.checkpointing import Call, checkpointed

NEEDS_VALUES = frozenset({"adamss"})
"""Adapter types whose shapes follow from the values of the weights. They are shown random ones, for
a moment in the memory that all weights take; with the real ones the shapes may be a little others.
"""

_PLACES = frozenset({"layer_idx", "layer_id", "layer_index", "block_idx", "layer_number"})


class FakeModel:
    """A model with an adapter and without values: its tensors are shapes.

    Attributes:
        model: with the adapter, in training mode.
        blocks: its L blocks.
        task: how it is fed.
        lowest: the first block in which something is trained.
        weights: of each block, and of what is in none (``None``): the last three fields of
            :class:`~droppeft.costs.step_counts.BlockCounts`.
        fake: the mode in which it runs.

    Args:
        config: transformers' configuration of a sequence classifier; left as it is.
        spec: of the adapter.
        new_modules: parts of the head that are trained, besides the classifier.
        quantization: of all linear maps but the head's.
        device: what the tensors are said to be on: ``cpu``, or ``cuda`` where torch has it.

    Raises:
        DroppeftError: an adapter that does not fit the model.
    """

    def __init__(
        self,
        config: Any,
        spec: AdapterSpec,
        new_modules: Sequence[str] = (),
        quantization: str = "none",
        device: str = "cpu",
    ) -> None:
        plain = empty_model(config)
        self.task = Classification(token_inputs(plain), 0, torch.device(device))
        with_stand_ins(plain, quantization)
        if NEEDS_VALUES & {layer.type for layer in spec.layers if layer}:
            plain = _with_some_values(plain)
        self.model = attach(plain, spec, find_blocks(plain)[0], 0, new_modules).train()
        _settle(self.model)
        path, self.blocks = find_blocks(self.model)
        parameters = trainable_by_layer(self.model, path)
        self.lowest = min((key for key in parameters if isinstance(key, int)), default=0)
        self.weights = _weights(self.model, self.blocks, parameters)
        self.fake = FakeTensorMode()
        with self.fake:
            _make_fake(self.model, self.task.device)

    def batch(self, rows: int, length: int) -> Batch:
        """Columns (B, S), with a mask, as where rows are padded."""
        names = [*self.task.inputs, "attention_mask"]
        column = torch.ones(rows, length, dtype=torch.int64, device=self.task.device)
        return {**{name: column.clone() for name in names}, "labels": column.new_zeros(rows)}


def empty_model(config: Any) -> nn.Module:
    """A sequence classifier in fp32 on the meta device: no values, no memory."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"), quiet():
        model: nn.Module = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32
        )
    return model


def _with_some_values(plain: nn.Module) -> nn.Module:
    plain = plain.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for value in plain.parameters():
        nn.init.normal_(value, std=0.02, generator=generator)
    return plain


def _settle(model: nn.Module) -> None:
    """Some types toss a coin in every forward, by value, whether to skip a module: it says no."""
    for module in model.modules():
        if hasattr(module, "module_dropout"):
            module.training = False


def count_step(
    paper: FakeModel,
    batch: int,
    length: int,
    precision: str = "fp32",
    checkpointing: bool = False,
) -> StepCounts:
    """Count a step so that the parts of its active blocks, and the rest, add up.

    One block of each kind is executed; the others are like it. A block counts as if something below
    it were trained. What the lowest active one is spared, since nothing is, is taken off the rest,
    because every step has one lowest block: the rest may be below 0. What blocks share (masks,
    positions) belongs to the rest. All this is exact while a block of every kind is active.

    Args:
        paper: what is counted.
        batch: B. A single row counts as if it were padded, for which torch keeps a little more.
        length: S.
        precision: as ``training.precision``.
        checkpointing: ``stored_bytes`` are then the blocks' inputs, ``backward_flops`` contain the
            second forward, and ``passing_bytes`` what one block stores.

    Raises:
        DroppeftError: the model has no forward without values, or cannot be checkpointed.
    """
    kinds = _kinds(paper.blocks, paper.lowest)
    # The last block besides: what passes is most where the backward begins, above another block.
    chosen = sorted({*kinds, len(kinds) - 1})
    settings = (batch, length, precision, checkpointing)
    whole = _executed(paper, chosen, *settings, cut=True)
    least = _executed(paper, [paper.lowest], *settings, cut=False)
    blocks = tuple(
        BlockCounts(
            whole.flops[kind, "forward"],
            whole.flops[kind, "backward"],
            whole.stored_for(kind),
            *paper.weights[index],
        )
        for index, kind in enumerate(kinds)
    )
    lowest = blocks[paper.lowest]
    shared = whole.stored_bytes - sum(map(whole.stored_for, chosen))
    rest = BlockCounts(
        least.flops_in("forward") - lowest.forward_flops,
        least.flops_in("backward") - lowest.backward_flops,
        shared + least.stored_for(paper.lowest) - lowest.stored_bytes,
        *paper.weights[None],
    )
    return StepCounts(batch, length, blocks, rest, whole.peak_bytes - whole.stored_bytes)


def _executed(
    paper: FakeModel,
    chosen: Sequence[int],
    rows: int,
    length: int,
    precision: str,
    checkpointing: bool,
    *,
    cut: bool,
) -> OperationCounter:
    """Run one step with the chosen blocks alone."""
    counter = OperationCounter(paper.model)
    blocks = {index: paper.blocks[index] for index in chosen}

    def note(call: Call) -> None:
        [index] = [index for index, block in blocks.items() if block is call.block]
        for tensor in call.tensors:
            counter.store(tensor, index)

    recomputing = checkpointed(paper.model, paper.blocks, note) if checkpointing else nullcontext()
    try:
        with (
            paper.fake,
            _ExpertsInFp32(),  # type: ignore[no-untyped-call]
            without_cache(paper.model),
            recomputing,
            gated(paper.blocks) as gates,
            counter,
            watched(counter, blocks, paper.lowest if cut else None),
        ):
            gates.active = tuple(index in blocks for index in range(len(paper.blocks)))
            batch = paper.batch(rows, length)
            with autocast(precision, paper.task.device), counter.storing():
                loss, _ = paper.task.loss_and_logits(paper.model, batch)
            counter.phase, counter.region = "backward", None
            loss.backward()  # type: ignore[no-untyped-call]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        config: Any = paper.model.config
        raise DroppeftError(
            f"the costs of a {config.model_type} model cannot be counted without running it: what "
            f"it computes depends on values ({error.func})"
        ) from None
    finally:
        paper.model.zero_grad(set_to_none=True)
    return counter


class _ExpertsInFp32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of tokens with their experts' weights: torch's shape rule knows bf16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            tokens, weights, *_ = args  # (tokens, in) and (experts, in, out)
            return tokens.new_empty(tokens.shape[0], weights.shape[-1])
        return func(*args, **(kwargs or {}))


def _kinds(blocks: Sequence[nn.Module], lowest: int) -> list[int]:
    """Per block, the one that is executed for it: a like one, not below the lowest trained one."""
    first: dict[object, int] = {}
    for index in (lowest, *range(len(blocks))):
        first.setdefault(_kind(blocks[index]), index)
    return [first[_kind(block)] for block in blocks]


def _kind(block: nn.Module) -> object:
    """All that tells blocks apart: classes, shapes, what is trained, plain attributes."""
    parts: list[object] = []
    for name, module in block.named_modules():
        plain = (
            (key, value)
            for key, value in vars(module).items()
            if key not in _PLACES and isinstance(value, int | float | str | None)
        )
        values = module.named_parameters(recurse=False)
        shapes = ((key, value.shape, value.requires_grad) for key, value in values)
        parts.append((name, type(module), tuple(plain), tuple(shapes)))
    return tuple(parts)


def _weights(
    model: nn.Module, blocks: Sequence[nn.Module], parameters: Parameters
) -> Mapping[Region, tuple[int, int, int]]:
    """Bytes, values and trained values of each region's parameters; of buffers the bytes alone."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        owner |= {id(value): index for value in (*block.parameters(), *block.buffers())}
        owner |= {id(value): index for value in parameters.get(index, {}).values()}
    found = {region: [0, 0, 0] for region in (*range(len(blocks)), None)}
    bits = {
        id(module.weight): module.quantization
        for module in model.modules()
        if isinstance(module, QuantizedStub)
    }
    for value in model.buffers():
        found[owner.get(id(value))][0] += value.nbytes
    for value in model.parameters():
        sums = found[owner.get(id(value))]
        few = bits.get(id(value))
        sums[0] += kept_bytes(value.shape, few) if few else value.nbytes
        sums[1] += value.numel()
        sums[2] += value.numel() * value.requires_grad
    return {region: (sums[0], sums[1], sums[2]) for region, sums in found.items()}


def _make_fake(model: nn.Module, device: torch.device) -> None:
    """Put tensors of the present mode into the place of all the model's own."""
    made: dict[int, torch.Tensor] = {}

    def fake(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in made:
            empty = torch.empty(value.shape, dtype=value.dtype, device=device)
            wanted = value.requires_grad
            is_parameter = isinstance(value, nn.Parameter)
            made[id(value)] = nn.Parameter(empty, requires_grad=wanted) if is_parameter else empty
        return made[id(value)]

    for module in model.modules():
        # peft has the positions of a prompt in a plain dictionary.
        plain = (value for value in vars(module).values() if isinstance(value, dict))
        for tensors in plain:
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor):
                    tensors[name] = fake(value)
