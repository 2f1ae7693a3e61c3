"""Local training of a client: its batches, modes of layers and cached layers. Ours."""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import transformers

from droppeft import seeds
from droppeft.adapters.by_layer import Parameters
from droppeft.cached_layers import FrozenLayers, StateStore
from droppeft.cached_layers.cached_layers import CachedLayers, content_name, state_folder
from droppeft.client.client_model import ClientModel
from droppeft.data.partition import ClientRows
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenRows
from droppeft.layer_dropout.modes import Mode, Modes
from droppeft.messages.instruction import Instruction, modes_of
from droppeft.messages.reply import CachedLayersCost
from droppeft.messages.tensors import HEAD, Tensors
from droppeft.models.precision import autocast
from droppeft.training.deadline import Deadline
from droppeft.training.learning_rates import rate_factor
from droppeft.training.loop import Step, TrainOutcome, train, training_batches


def train_locally(
    model: ClientModel,
    parameters: Parameters,
    table: TokenRows,
    rows: ClientRows,
    instruction: Instruction,
    anchors: Tensors | None = None,
    deadline: Deadline | None = None,
) -> tuple[TrainOutcome, CachedLayersCost]:
    """Take the optimizer steps of an instruction.

    Batches, modes of layers and module dropout follow from (seed, round, client).

    Args:
        parameters: the parameters that are trained, by layer.
        anchors: the values that a proximal term pulls towards; by default the values that training
            begins with.
        deadline: the end of the time that the site gives; ``None`` if it gives all.

    Returns:
        The outcome, and the cost of the cached layers.
    """
    rng = seeds.numpy_generator(
        instruction.seed, purpose="batches", round=instruction.round, client=instruction.client
    )
    batches = training_batches(
        rows.train, table, instruction.training.batch_size, instruction.budget, rng
    )
    parts = [_parts(rows, table, instruction.training.micro_batch_size) for rows in batches]
    modes = _drawn_modes(parameters, instruction, len(batches))
    needed = {
        layer
        for layer, in_steps in enumerate(zip(*modes, strict=True))
        if any(mode is not Mode.SKIP for mode in in_steps)
    }
    start = time.perf_counter()
    cached = None
    if instruction.frozen:
        flat = list(itertools.chain.from_iterable(parts))
        cached = _cached_layers(model, table, flat, instruction, needed)
    model.load_layers(needed)
    loading_s = time.perf_counter() - start
    with torch.random.fork_rng():
        # Dropout modules of the backbone and the adapter use torch's global generator.
        torch.manual_seed(
            seeds.seed_for(
                instruction.seed,
                purpose="modules",
                round=instruction.round,
                client=instruction.client,
            )
        )
        outcome = train(
            model.trainable(parameters),
            _steps(model, table, parts, modes, instruction),
            instruction.training,
            instruction.objective,
            cached,
            anchors=anchors,
            deadline=deadline,
        )
    outcome = replace(outcome, wall_s=outcome.wall_s + loading_s)
    if cached is None:
        return outcome, CachedLayersCost()
    cached.close()
    return outcome, cached.cost


def _parts(rows: Rows, table: TokenRows, size: int | None) -> list[Rows]:
    """Split the rows of a step into parts of some rows of similar length."""
    if size is None or len(rows) <= size:
        return [rows]
    by_length = rows[np.argsort(table.lengths[rows], kind="stable")]
    return [by_length[first : first + size] for first in range(0, len(rows), size)]


def _steps(
    model: ClientModel,
    table: TokenRows,
    parts: Sequence[Sequence[Rows]],
    modes: Sequence[Modes],
    instruction: Instruction,
) -> list[Step]:
    """Return batches, modes of layers and learning rate factor of every step."""
    return [
        Step(
            [model.task.collate(table, rows) for rows in of_step],
            of_layers,
            rate_factor(
                instruction.training,
                (instruction.round - 1 + (step + 0.5) / len(parts)) / instruction.training.rounds,
            ),
        )
        for step, (of_step, of_layers) in enumerate(zip(parts, modes, strict=True))
    ]


def _cached_layers(
    model: ClientModel,
    table: TokenRows,
    batches: Sequence[Rows],
    instruction: Instruction,
    needed: set[int],
) -> CachedLayers:
    """Return the frozen layers of the model, with the states that this client has stored.

    Args:
        needed: indices of the layers that the steps run, at first with the frozen ones. If states
            are stored, the frozen layers are removed from this set.
    """
    first, store = range(instruction.frozen), _store(model, instruction)

    @contextmanager
    def frozen_in_memory() -> Iterator[None]:
        model.load_layers({*needed, *first})
        yield
        model.load_layers(needed)

    cached = CachedLayers(
        FrozenLayers(model.model, model.blocks, instruction.frozen),
        store,
        table,
        model.task,
        batches,
        partial(autocast, instruction.training.precision, model.device),
        frozen_in_memory if model.is_offloading else nullcontext,
    )
    if store is not None:
        needed.difference_update(first)
        if model.is_offloading:
            model.load_layers(first)
            cached.build()
    return cached


def _store(model: ClientModel, instruction: Instruction) -> StateStore | None:
    """Return the store of this client's states, or ``None`` if none are stored."""
    if instruction.cache is None:
        return None
    content = content_name(
        weights=model.weights_hash,
        base_delta=instruction.base_delta.version if instruction.base_delta else "",
        depth=instruction.frozen,
        stored=instruction.cache.precision,
        computed=instruction.training.precision,
        threads=torch.get_num_threads(),
        accelerator=str(model.device),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    folder = state_folder(instruction.run) / f"client-{instruction.client:06}"
    return StateStore(folder, content, instruction.round, instruction.cache)


def _drawn_modes(parameters: Parameters, instruction: Instruction, steps: int) -> list[Modes]:
    """Return the modes of every step; they depend on (seed, round, client, step) alone."""
    modes = modes_of(instruction)
    layers = [key for key in parameters if isinstance(key, int)]
    needed = () if HEAD in parameters else layers

    def draw(step: int) -> Modes:
        drawn_at = 0 if modes.every is None else step - step % modes.every
        generator = partial(
            seeds.python_generator,
            instruction.seed,
            round=instruction.round,
            client=instruction.client,
            step=drawn_at,
        )
        return modes.draw(
            generator(purpose="starts"), generator(purpose="gates"), need_one_of=needed
        )

    return [draw(step) for step in range(steps)]
