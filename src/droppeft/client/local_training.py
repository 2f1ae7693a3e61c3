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
from droppeft.cached_layers import FrozenPrefix, StateStore
from droppeft.cached_layers.cached_layers import PrefixOfTurn, content_name, state_folder
from droppeft.client.client_model import ClientModel
from droppeft.data.partition import DeviceRows
from droppeft.data.texts import Rows
from droppeft.data.tokens import TokenTable
from droppeft.layer_dropout import sample_active
from droppeft.messages import HEAD, Plan, PrefixCost, Tensors
from droppeft.models.precision import autocast
from droppeft.sharing.criteria import CRITERIA
from droppeft.training.loop import Step, TrainOutcome, rate_factor, train, turn_batches

Gates = tuple[bool, ...]
"""Which layers run in a step."""


def reads(plan: Plan) -> str:
    """What the rule's criterion needs to be collected during the training."""
    return "" if plan.sharing is None else CRITERIA[plan.sharing.criterion].reads


def train_locally(
    model: ClientModel,
    parameters: Parameters,
    table: TokenTable,
    rows: DeviceRows,
    plan: Plan,
    anchors: Tensors | None = None,
) -> tuple[TrainOutcome, PrefixCost]:
    """Take the Plan's steps; batches, gates and module dropout follow from (seed, round, device).

    Args:
        parameters: what is trained.
        anchors: values that a proximal term pulls to; by default those that training begins with.
    """
    rng = seeds.numpy_generator(plan.seed, purpose="batches", round=plan.round, device=plan.device)
    chosen = turn_batches(rows.train, table, plan.training.batch_size, plan.budget, rng)
    gates = [_gates(model, parameters, plan, step) for step in range(len(chosen))]
    needed = {layer for layer, active in enumerate(zip(*gates, strict=True)) if any(active)}
    start = time.perf_counter()
    prefix = _prefix(model, table, chosen, plan, needed) if plan.frozen else None
    model.load_layers(needed)
    before_s = time.perf_counter() - start
    with torch.random.fork_rng():
        # For dropout inside the backbone and the adapter: torch's global generator is theirs.
        torch.manual_seed(
            seeds.seed_for(plan.seed, purpose="modules", round=plan.round, device=plan.device)
        )
        outcome = train(
            model.trainable(parameters),
            _steps(model, table, chosen, gates, plan),
            plan.training,
            plan.objective,
            prefix,
            with_mean_gradient=reads(plan) == "mean gradient",
            anchors=anchors,
        )
    outcome = replace(outcome, wall_s=outcome.wall_s + before_s)
    if prefix is None:
        return outcome, PrefixCost()
    prefix.close()
    return outcome, prefix.cost


def _steps(
    model: ClientModel,
    table: TokenTable,
    chosen: Sequence[Rows],
    gates: Sequence[Gates],
    plan: Plan,
) -> list[Step]:
    """Batch, gates and learning rate of every step."""
    return [
        Step(model.task.collate(table, rows), active, _factor(plan, (step + 0.5) / len(chosen)))
        for step, (rows, active) in enumerate(zip(chosen, gates, strict=True))
    ]


def _factor(plan: Plan, progress: float) -> float:
    """Part of the peak learning rates at a point of the local training.

    A measurement is no round of the run: its rates fall from the peak to nothing.
    """
    if plan.measure:
        return 1.0 - progress
    return rate_factor(plan.training, (plan.round - 1 + progress) / plan.training.rounds)


def _prefix(
    model: ClientModel,
    table: TokenTable,
    chosen: Sequence[Rows],
    plan: Plan,
    needed: set[int],
) -> PrefixOfTurn:
    """The frozen layers at work, with what this client has stored of them.

    Args:
        needed: layers that the steps run, the frozen ones as if they ran too. Those that are not
            needed when their states are on the disk are taken out.
    """
    first, store = range(plan.frozen), _store(model, plan)

    @contextmanager
    def at_hand() -> Iterator[None]:
        model.load_layers({*needed, *first})
        yield
        model.load_layers(needed)

    prefix = PrefixOfTurn(
        FrozenPrefix(model.model, model.blocks, plan.frozen),
        store,
        table,
        model.task,
        chosen,
        partial(autocast, plan.training.precision, model.device),
        at_hand if model.is_offloading else nullcontext,
    )
    if store is not None:
        needed.difference_update(first)
        if model.is_offloading:
            model.load_layers(first)
            prefix.build()
    return prefix


def _store(model: ClientModel, plan: Plan) -> StateStore | None:
    """This client's own stored states, ``None`` where the Plan stores none."""
    if plan.cache is None:
        return None
    content = content_name(
        weights=model.weights_hash,
        base_delta=plan.base_delta.version if plan.base_delta else "",
        depth=plan.frozen,
        stored=plan.cache.precision,
        computed=plan.training.precision,
        threads=torch.get_num_threads(),
        accelerator=str(model.device),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    folder = state_folder(plan.run) / f"device-{plan.device:06}"
    return StateStore(folder, content, plan.round, plan.cache)


def _gates(model: ClientModel, parameters: Parameters, plan: Plan, step: int) -> Gates:
    """Which layers run at a step, from (seed, round, device, step) alone."""
    dropout = plan.dropout
    if dropout is None:
        return (True,) * model.num_layers
    layers = [key for key in parameters if isinstance(key, int)]
    drawn_at = 0 if dropout.every is None else step - step % dropout.every
    rng = seeds.python_generator(
        plan.seed, purpose="gates", round=plan.round, device=plan.device, step=drawn_at
    )
    needed = () if HEAD in parameters else layers
    return sample_active(dropout.rates, dropout.sampling, rng, need_one_of=needed)
