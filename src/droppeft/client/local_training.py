"""The steps of a client's local training, with its gates and its cached layers; ours."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import transformers

from droppeft import seeds
from droppeft.adapters.by_layer import Parameters
from droppeft.cached_layers import FrozenLayers, StateStore
from droppeft.cached_layers.cached_layers import CachedLayers, content_name, state_folder
from droppeft.client.client_model import ClientModel
from droppeft.data.partition import ClientRows
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenTable
from droppeft.layer_dropout import sample_active
from droppeft.messages import HEAD, CachedLayersCost, Instruction, Tensors
from droppeft.models.precision import autocast
from droppeft.sharing.criteria import CRITERIA
from droppeft.training.loop import Step, TrainOutcome, rate_factor, train, training_batches

Gates = tuple[bool, ...]
"""Which layers run in a step."""


def reads(instruction: Instruction) -> str:
    """What the rule's criterion needs to be collected during the training."""
    return "" if instruction.sharing is None else CRITERIA[instruction.sharing.criterion].reads


def train_locally(
    model: ClientModel,
    parameters: Parameters,
    table: TokenTable,
    rows: ClientRows,
    instruction: Instruction,
    anchors: Tensors | None = None,
) -> tuple[TrainOutcome, CachedLayersCost]:
    """Take the instruction's steps; batches, gates and module dropout follow from (seed, round,
    client).

    Args:
        parameters: what is trained.
        anchors: values that a proximal term pulls to; by default those that training begins with.
    """
    rng = seeds.numpy_generator(
        instruction.seed, purpose="batches", round=instruction.round, client=instruction.client
    )
    chosen = training_batches(
        rows.train, table, instruction.training.batch_size, instruction.budget, rng
    )
    gates = [_gates(model, parameters, instruction, step) for step in range(len(chosen))]
    needed = {layer for layer, active in enumerate(zip(*gates, strict=True)) if any(active)}
    start = time.perf_counter()
    cached = (
        _cached_layers(model, table, chosen, instruction, needed) if instruction.frozen else None
    )
    model.load_layers(needed)
    before_s = time.perf_counter() - start
    with torch.random.fork_rng():
        # For dropout inside the backbone and the adapter: torch's global generator is theirs.
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
            _steps(model, table, chosen, gates, instruction),
            instruction.training,
            instruction.objective,
            cached,
            with_mean_gradient=reads(instruction) == "mean gradient",
            anchors=anchors,
        )
    outcome = replace(outcome, wall_s=outcome.wall_s + before_s)
    if cached is None:
        return outcome, CachedLayersCost()
    cached.close()
    return outcome, cached.cost


def _steps(
    model: ClientModel,
    table: TokenTable,
    chosen: Sequence[Rows],
    gates: Sequence[Gates],
    instruction: Instruction,
) -> list[Step]:
    """Batch, gates and learning rate of every step."""
    return [
        Step(
            model.task.collate(table, rows),
            active,
            _factor(instruction, (step + 0.5) / len(chosen)),
        )
        for step, (rows, active) in enumerate(zip(chosen, gates, strict=True))
    ]


def _factor(instruction: Instruction, progress: float) -> float:
    """Part of the peak learning rates at a point of the local training.

    A measurement is no round of the run: its rates fall from the peak to nothing.
    """
    if instruction.measure:
        return 1.0 - progress
    return rate_factor(
        instruction.training, (instruction.round - 1 + progress) / instruction.training.rounds
    )


def _cached_layers(
    model: ClientModel,
    table: TokenTable,
    chosen: Sequence[Rows],
    instruction: Instruction,
    needed: set[int],
) -> CachedLayers:
    """The frozen layers at work, with what this client has stored of them.

    Args:
        needed: layers that the steps run, the frozen ones as if they ran too. Those that are not
            needed when their states are on the disk are taken out.
    """
    first, store = range(instruction.frozen), _store(model, instruction)

    @contextmanager
    def at_hand() -> Iterator[None]:
        model.load_layers({*needed, *first})
        yield
        model.load_layers(needed)

    cached = CachedLayers(
        FrozenLayers(model.model, model.blocks, instruction.frozen),
        store,
        table,
        model.task,
        chosen,
        partial(autocast, instruction.training.precision, model.device),
        at_hand if model.is_offloading else nullcontext,
    )
    if store is not None:
        needed.difference_update(first)
        if model.is_offloading:
            model.load_layers(first)
            cached.build()
    return cached


def _store(model: ClientModel, instruction: Instruction) -> StateStore | None:
    """This client's own stored states, ``None`` where the instruction stores none."""
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


def _gates(
    model: ClientModel, parameters: Parameters, instruction: Instruction, step: int
) -> Gates:
    """Which layers run at a step, from (seed, round, client, step) alone."""
    dropout = instruction.dropout
    if dropout is None:
        return (True,) * model.num_layers
    layers = [key for key in parameters if isinstance(key, int)]
    drawn_at = 0 if dropout.every is None else step - step % dropout.every
    rng = seeds.python_generator(
        instruction.seed,
        purpose="gates",
        round=instruction.round,
        client=instruction.client,
        step=drawn_at,
    )
    needed = () if HEAD in parameters else layers
    return sample_active(dropout.rates, dropout.sampling, rng, need_one_of=needed)
