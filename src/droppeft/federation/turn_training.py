"""On the device: the steps of a turn, with its gates and any frozen prefix; ours."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import transformers

from droppeft import seeds
from droppeft.adapters.by_layer import Parameters
from droppeft.config import Config
from droppeft.data.partition import DeviceRows
from droppeft.data.tables import Rows
from droppeft.data.tokens import TokenTable
from droppeft.federation.workbench import Workbench
from droppeft.frozen_prefix import FrozenPrefix, StateStore
from droppeft.frozen_prefix.turn import PrefixOfTurn, content_name, state_folder
from droppeft.layer_dropout import sample_active
from droppeft.plans import HEAD, Plan, PrefixCost, Tensors
from droppeft.precision import autocast
from droppeft.sharing.criteria import CRITERIA
from droppeft.training import ActiveAt, TrainOutcome, rate_factor, train, turn_batches


def reads(plan: Plan) -> str:
    """What the rule's criterion needs to be collected during the turn."""
    return "" if plan.sharing is None else CRITERIA[plan.sharing.criterion].reads


def train_turn(
    bench: Workbench,
    parameters: Parameters,
    table: TokenTable,
    rows: DeviceRows,
    config: Config,
    plan: Plan,
    anchors: Tensors | None = None,
) -> tuple[TrainOutcome, PrefixCost]:
    """Take the turn's steps; module dropout, batches and gates follow from (seed, round, device).

    Args:
        parameters: what is trained.
        anchors: values that a proximal term pulls to; by default those that it begins with.
    """
    settings = config.training
    rng = seeds.numpy_generator(plan.seed, purpose="batches", round=plan.round, device=plan.device)
    chosen = turn_batches(rows.train, table, settings.batch_size, plan.budget, rng)
    factors = [_factor(config, plan, (step + 0.5) / len(chosen)) for step in range(len(chosen))]
    active_at = _gates(bench, parameters, plan)
    drawn = [active_at(step) for step in range(len(chosen))]
    needed = {layer for layer, active in enumerate(zip(*drawn, strict=True)) if any(active)}
    start = time.perf_counter()
    prefix = _prefix(bench, table, chosen, config, plan, needed) if plan.frozen else None
    bench.hold(needed)
    before_s = time.perf_counter() - start
    with torch.random.fork_rng():
        # For dropout inside the backbone and the adapter: torch's global generator is theirs.
        torch.manual_seed(
            seeds.seed_for(plan.seed, purpose="modules", round=plan.round, device=plan.device)
        )
        outcome = train(
            bench.model,
            bench.blocks,
            parameters,
            [bench.task.collate(table, batch) for batch in chosen],
            drawn.__getitem__,
            factors,
            bench.task,
            settings,
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


def _factor(config: Config, plan: Plan, progress: float) -> float:
    """Part of the peak learning rates at a point of the turn.

    A measurement is no round of the run: its rates fall from the peak to nothing.
    """
    if plan.measure:
        return 1.0 - progress
    return rate_factor(config.training, (plan.round - 1 + progress) / config.rounds)


def _prefix(
    bench: Workbench,
    table: TokenTable,
    chosen: Sequence[Rows],
    config: Config,
    plan: Plan,
    needed: set[int],
) -> PrefixOfTurn:
    """The first layers, which nobody trains, with what this device keeps of them.

    Args:
        needed: layers that the turn's steps run, the first ones as if they ran too. Those that it
            does not need when their states are on the disk are taken out.
    """
    first = range(plan.frozen)

    @contextmanager
    def at_hand() -> Iterator[None]:
        bench.hold({*needed, *first})
        yield
        bench.hold(needed)

    settings, training, store = config.frozen, config.training, None
    if settings.cache:
        content = content_name(
            weights=bench.weights_hash,
            base_delta=plan.base_delta.version if plan.base_delta else "",
            depth=plan.frozen,
            stored=settings.precision,
            computed=training.precision,
            threads=torch.get_num_threads(),
            accelerator=str(bench.device),
            torch=torch.__version__,
            transformers=transformers.__version__,
        )
        folder = state_folder(config) / f"device-{plan.device}"
        store = StateStore(folder, content, plan.round, int(settings.limit_mb * 1e6))
    prefix = PrefixOfTurn(
        FrozenPrefix(bench.model, bench.blocks, plan.frozen),
        store,
        settings.precision,
        table,
        bench.task,
        chosen,
        partial(autocast, training.precision, bench.device),
        at_hand if bench.is_offloading else nullcontext,
    )
    if store is not None:
        needed.difference_update(first)
        if bench.is_offloading:
            bench.hold(first)
            prefix.build()
    return prefix


def _gates(bench: Workbench, parameters: Parameters, plan: Plan) -> ActiveAt:
    """Which layers run at each step, from (seed, round, device, step) alone."""
    dropout = plan.dropout
    if dropout is None:
        return lambda step: (True,) * bench.num_layers
    layers = [key for key in parameters if isinstance(key, int)]
    needed = () if HEAD in parameters else layers
    every = dropout.every

    def active_at(step: int) -> tuple[bool, ...]:
        drawn_at = 0 if every is None else step - step % every
        rng = seeds.python_generator(
            plan.seed, purpose="gates", round=plan.round, device=plan.device, step=drawn_at
        )
        return sample_active(dropout.rates, dropout.sampling, rng, need_one_of=needed)

    return active_at
