"""Count the FLOPs and bytes of a training step from a model's configuration, without weights.

Ours. The model runs on torch's fake tensors, which have a shape, a dtype and a device but no
memory. There are no formulas per architecture: the code that trains is what is counted.
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

from droppeft.adapters.attach import attach
from droppeft.adapters.by_layer import Parameters, trainable_by_layer
from droppeft.adapters.training_mode import set_training_mode
from droppeft.costs.operation_counter import OperationCounter, Region, watched
from droppeft.costs.quantized_stubs import QuantizedStub, quantized_bytes, replace_linear_maps
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import find_blocks, gated
from droppeft.messages.instruction import AdapterSpec
from droppeft.models.key_value_cache import without_cache
from droppeft.models.loading import LAST_MODULES, token_inputs
from droppeft.models.precision import DTYPES, autocast, hold_in
from droppeft.models.quiet import quiet
from droppeft.tasks.registry import task_named
from droppeft.tasks.task import Batch
from droppeft.training.checkpointing import Call, checkpointed
from droppeft.training.loop import computing_in

NEEDS_VALUES = frozenset({"adamss"})
"""Adapter types whose shapes depend on the values of the weights. They are attached to random
weights, which take their full memory for a moment; with the real weights the shapes may differ a
little."""

_INDEX_ATTRIBUTES = frozenset({"layer_idx", "layer_id", "layer_index", "block_idx", "layer_number"})


class FakeModel:
    """A model with an adapter whose tensors are fake: they have shapes but no values.

    Attributes:
        model: with the adapter, in training mode.
        blocks: its L blocks.
        task: computes inputs and loss.
        lowest: index of the first block with trainable parameters.
        weights: for each block, and for everything outside of blocks (``None``): the last three
            fields of :class:`~droppeft.costs.step_counts.BlockCounts`.
        fake_mode: torch's mode in which it runs.

    Args:
        config: transformers' configuration of the model; it is not changed.
        task: name of the task.
        spec: of the adapter.
        new_modules: parts of the head that are trained besides the classifier.
        quantization: of all linear maps but the head's.
        device: device of the fake tensors: ``cpu``, or ``cuda`` where torch supports it.
        precision: of the step, and of frozen weights that are not quantised.
        backbone_dropout: as the setting.

    Raises:
        DroppeftError: the adapter does not fit the model.
    """

    def __init__(
        self,
        config: Any,
        task: str,
        spec: AdapterSpec,
        new_modules: Sequence[str] = (),
        quantization: str = "none",
        device: str = "cpu",
        precision: str = "fp32",
        *,
        backbone_dropout: bool = False,
    ) -> None:
        self.precision = precision
        plain = empty_model(config, task)
        kind = task_named(task)
        self.task = kind.on(token_inputs(plain), 0, torch.device(device))
        replace_linear_maps(plain, quantization, kind.heads)
        if NEEDS_VALUES & {layer.type for layer in spec.layers if layer}:
            plain = _with_random_values(plain)
        trained = () if kind.generates else (*LAST_MODULES, *new_modules)
        hold_in(plain, DTYPES[precision], trained)
        self.model = attach(plain, spec, find_blocks(plain)[0], 0, new_modules, kind.adapter_task)
        set_training_mode(self.model, backbone_dropout=backbone_dropout)
        _disable_module_dropout(self.model)
        path, self.blocks = find_blocks(self.model)
        parameters = trainable_by_layer(self.model, path)
        self.lowest = min((key for key in parameters if isinstance(key, int)), default=0)
        self.weights = _weights(self.model, self.blocks, parameters)
        self.fake_mode = FakeTensorMode()
        with self.fake_mode:
            _make_fake(self.model, self.task.device)

    def batch(self, rows: int, length: int) -> Batch:
        """A batch of rows of a length, as the task makes it."""
        return self.task.sample_batch(rows, length)


def empty_model(config: Any, task: str) -> nn.Module:
    """A task's model on the meta device, which takes no memory."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"), quiet():
        model: nn.Module = task_named(task).auto_class.from_config(config, dtype=torch.float32)
    return model


def _with_random_values(plain: nn.Module) -> nn.Module:
    plain = plain.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for value in plain.parameters():
        nn.init.normal_(value, std=0.02, generator=generator)
    return plain


def _disable_module_dropout(model: nn.Module) -> None:
    """Some adapter types skip modules at random, which needs values: they always run here."""
    for module in model.modules():
        if hasattr(module, "module_dropout"):
            module.training = False


def count_step(
    fake_model: FakeModel,
    batch: int,
    length: int,
    checkpointing: bool = False,
) -> StepCounts:
    """Count a step so that the counts of its active blocks and of the rest add up to the step's.

    One block of each kind is executed, and its counts are used for all blocks like it. Each block
    is counted as if something below it were trained. The lowest active block has a cheaper
    backward, since nothing below it is trained. Every step has exactly one such block, so the
    difference is subtracted from the rest, which may become negative. Tensors that blocks share
    (masks, positions) belong to the rest. The sum is exact if a block of every kind is active.

    Args:
        fake_model: the model to count.
        batch: B. A single row is counted as if it were padded, for which torch stores slightly
            more.
        length: S.
        checkpointing: if true, ``stored_bytes`` are the blocks' inputs, ``backward_flops`` include
            the second forward, and ``passing_bytes`` include what one block stores.

    Raises:
        DroppeftError: the model's forward needs values, or it cannot be checkpointed.
    """
    kinds = _kinds(fake_model.blocks, fake_model.lowest)
    # Also the last block: temporary tensors peak where the backward begins, above another block.
    chosen = sorted({*kinds, len(kinds) - 1})
    settings = (batch, length, checkpointing)
    whole = _executed(fake_model, chosen, *settings, cut=True)
    least = _executed(fake_model, [fake_model.lowest], *settings, cut=False)
    blocks = tuple(
        BlockCounts(
            whole.flops[kind, "forward"],
            whole.flops[kind, "backward"],
            whole.stored_for(kind),
            *fake_model.weights[index],
        )
        for index, kind in enumerate(kinds)
    )
    lowest = blocks[fake_model.lowest]
    shared = whole.stored_bytes - sum(map(whole.stored_for, chosen))
    rest = BlockCounts(
        least.flops_in("forward") - lowest.forward_flops,
        least.flops_in("backward") - lowest.backward_flops,
        shared + least.stored_for(fake_model.lowest) - lowest.stored_bytes,
        *fake_model.weights[None],
    )
    return StepCounts(batch, length, blocks, rest, whole.peak_bytes - whole.stored_bytes)


def _executed(
    fake_model: FakeModel,
    chosen: Sequence[int],
    rows: int,
    length: int,
    checkpointing: bool,
    *,
    cut: bool,
) -> OperationCounter:
    """Run one step in which only the chosen blocks are active."""
    counter = OperationCounter(fake_model.model)
    precision, device = fake_model.precision, fake_model.task.device
    blocks = {index: fake_model.blocks[index] for index in chosen}

    def note(call: Call) -> None:
        [index] = [index for index, block in blocks.items() if block is call.block]
        for tensor in call.tensors:
            counter.store(tensor, index)

    recomputing = (
        checkpointed(fake_model.model, fake_model.blocks, note) if checkpointing else nullcontext()
    )
    try:
        with (
            fake_model.fake_mode,
            _ExpertsInFp32(),  # type: ignore[no-untyped-call]
            without_cache(fake_model.model),
            computing_in(precision, fake_model.model, device),
            recomputing,
            gated(fake_model.blocks) as gates,
            counter,
            watched(counter, blocks, fake_model.lowest if cut else None),
        ):
            gates.active = tuple(index in blocks for index in range(len(fake_model.blocks)))
            batch = fake_model.batch(rows, length)
            with autocast(precision, device), counter.storing():
                loss = fake_model.task.loss(fake_model.model, batch)
            counter.phase, counter.region = "backward", None
            loss.backward()  # type: ignore[no-untyped-call]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        config: Any = fake_model.model.config
        raise DroppeftError(
            f"the costs of a {config.model_type} model cannot be counted without its weights: its "
            f"forward depends on values ({error.func}); use another model"
        ) from None
    finally:
        fake_model.model.zero_grad(set_to_none=True)
    return counter


class _ExpertsInFp32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shape of products with experts' weights: torch's own rule takes only bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            tokens, weights, *_ = args  # (tokens, in) and (experts, in, out)
            return tokens.new_empty(tokens.shape[0], weights.shape[-1])
        return func(*args, **(kwargs or {}))


def _kinds(blocks: Sequence[nn.Module], lowest: int) -> list[int]:
    """For each block, the block of its kind that is executed; ``lowest`` is preferred."""
    first: dict[object, int] = {}
    for index in (lowest, *range(len(blocks))):
        first.setdefault(_kind(blocks[index]), index)
    return [first[_kind(block)] for block in blocks]


def _kind(block: nn.Module) -> object:
    """What blocks of a kind have in common: classes, shapes, what is trained, attributes."""
    parts: list[object] = []
    for name, module in block.named_modules():
        plain = (
            (key, value)
            for key, value in vars(module).items()
            if key not in _INDEX_ATTRIBUTES and isinstance(value, int | float | str | None)
        )
        values = module.named_parameters(recurse=False)
        shapes = ((key, value.shape, value.requires_grad) for key, value in values)
        parts.append((name, type(module), tuple(plain), tuple(shapes)))
    return tuple(parts)


def _weights(
    model: nn.Module, blocks: Sequence[nn.Module], parameters: Parameters
) -> Mapping[Region, tuple[int, int, int]]:
    """For each region: bytes of parameters and buffers, number of parameters, of trained ones."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        owner |= {id(value): index for value in (*block.parameters(), *block.buffers())}
        owner |= {id(value): index for value in parameters.get(index, {}).values()}
    totals = {region: [0, 0, 0] for region in (*range(len(blocks)), None)}
    bits = {
        id(module.weight): module.quantization
        for module in model.modules()
        if isinstance(module, QuantizedStub)
    }
    for value in model.buffers():
        totals[owner.get(id(value))][0] += value.nbytes
    for value in model.parameters():
        sums = totals[owner.get(id(value))]
        quantization = bits.get(id(value))
        sums[0] += quantized_bytes(value.shape, quantization) if quantization else value.nbytes
        sums[1] += value.numel()
        sums[2] += value.numel() * value.requires_grad
    return {region: (sums[0], sums[1], sums[2]) for region, sums in totals.items()}


def _make_fake(model: nn.Module, device: torch.device) -> None:
    """Replace all tensors of a model by fake ones; call it in a fake tensor mode."""
    made: dict[int, torch.Tensor] = {}

    def fake(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in made:
            empty = torch.empty(value.shape, dtype=value.dtype, device=device)
            wanted = value.requires_grad
            is_parameter = isinstance(value, nn.Parameter)
            made[id(value)] = nn.Parameter(empty, requires_grad=wanted) if is_parameter else empty
        return made[id(value)]

    for module in model.modules():
        # peft stores the positions of a prompt in a plain dictionary.
        plain = (value for value in vars(module).values() if isinstance(value, dict))
        for tensors in plain:
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor):
                    tensors[name] = fake(value)
