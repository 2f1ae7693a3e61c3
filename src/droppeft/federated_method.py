"""What a federated method is: three functions over explicit state; the engine is a detail.

The shape follows fedjax's federated algorithm: a method is a value, not a class to inherit from.
Methods differ by the Plans they write and by how they merge; neither the round loop nor the
device knows which method it serves.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from droppeft.config import AdapterConfig, Config
from droppeft.costs.modelled_clock import Clock
from droppeft.costs.step_counts import StepCounts
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import scheduled_rates
from droppeft.messages import (
    AdapterSpec,
    Budget,
    GlobalModel,
    LayerAdapter,
    LayerDropout,
    Layout,
    LocalTraining,
    NoMemory,
    Objective,
    Plan,
    Reply,
    ServerState,
    StateCache,
    Tensors,
    Update,
    flatten,
)
from droppeft.sharing.aggregation import average_over_holders, by_examples
from droppeft.sharing.server_optimizer import MOMENTS, step


@dataclass(frozen=True)
class Setup:
    """What every function of a method may read.

    Attributes:
        config: the run.
        num_layers: L of the backbone.
        fresh_tensors: initial values of an adapter of given shapes, from the run's seed.
        layout: the tensors of such an adapter: name to (layer, shape).
        clock: what turns take on the devices that the run stands for; ``None`` for a model whose
            arithmetic cannot be counted. Decisions about time are made by it and not by what this
            machine measured, so that a seed determines a run.
        run: names the run where devices keep something for it.
        longest_step: a step of the longest rows in the run's precision, quantisation included;
            for what fits a device's memory.
    """

    config: Config
    num_layers: int
    fresh_tensors: Callable[[AdapterSpec], Tensors]
    layout: Callable[[AdapterSpec], Layout]
    clock: Clock | None
    run: str = ""
    longest_step: Callable[[AdapterSpec], StepCounts] | None = None


OfDevice = Callable[[Setup, ServerState, int, int], Plan]
"""The Plan for a device in a round."""


def _as_it_is(config: Config) -> Config:
    return config


def _always(config: Config) -> bool:
    return True


def _nothing(setup: Setup, state: ServerState) -> None:
    return None


def _all_is_well(config: Config) -> None:
    return None


def _global_model(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
    return without_steps(full_plan(setup, state, round, device))


@dataclass(frozen=True)
class Method:
    """A federated method.

    Attributes:
        name: as on the command line.
        summary: one line for people.
        tables: optional tables of the configuration that it reads; a setting of another is
            refused.
        init: state before round 1, of a configuration that passed :attr:`check`. Must raise what
            :attr:`plan` would raise for a number of layers that cannot work, so that nothing is
            written for a run that cannot start.
        plan: one Plan per member of the cohort, in its order; a function of its arguments alone,
            since what it decides is only remembered in the Plans.
        merge: the state after a round, from its Plans and, in the same order, their replies; an
            Update that was refused is a Failure there, and perhaps all are.
        check: raises a DroppeftError for a configuration that it cannot work with, whatever the
            model; :mod:`droppeft.methods.rules` calls it before anything is loaded.
        adjust: the configuration that its run has instead of the given one; of an adjusted one it
            makes nothing else.
        own: the Plan that measures a device's own model, as it would begin the turn of that round:
            the global model, where devices keep nothing to themselves.
        has_global_model: of a configuration; otherwise the state's model, or its head, is only
            where devices begin.
        note: plain values about the last round that a reader wants in the ledger, or ``None``.
        memory_type: class of the state's memory: a frozen dataclass of numbers, texts, tuples,
            mappings and dataclasses of such, which checkpoints hold as JSON.
    """

    name: str
    summary: str
    tables: frozenset[str]
    init: Callable[[Setup], ServerState]
    plan: Callable[[Setup, ServerState, int, Sequence[int]], list[Plan]]
    merge: Callable[[Setup, ServerState, Sequence[Plan], Sequence[Reply]], ServerState]
    check: Callable[[Config], None] = _all_is_well
    adjust: Callable[[Config], Config] = _as_it_is
    own: OfDevice = _global_model
    has_global_model: Callable[[Config], bool] = _always
    note: Callable[[Setup, ServerState], Mapping[str, Any] | None] = _nothing
    memory_type: type = NoMemory


def uniform_adapter(setup: Setup) -> AdapterSpec:
    """The configured adapter in every layer behind the frozen ones.

    Raises:
        DroppeftError: all layers are frozen.
    """
    frozen = setup.config.frozen.count
    if frozen >= setup.num_layers:
        raise DroppeftError(
            f"frozen.layers={frozen} leaves none of the {setup.num_layers} layers to train"
        )
    return adapter_spec(setup.config.adapter, setup.num_layers, frozen)


def adapter_spec(chosen: AdapterConfig, num_layers: int, frozen: int = 0) -> AdapterSpec:
    """The same adapter in each of so many layers, but for the first ``frozen``."""
    layer = LayerAdapter(type=chosen.type, rank=chosen.rank, width=chosen.width)
    return AdapterSpec(
        layers=(None,) * frozen + (layer,) * (num_layers - frozen),
        alpha=chosen.alpha,
        dropout=chosen.dropout,
        targets=chosen.targets,
        tokens=chosen.tokens,
        options=tuple(sorted(chosen.options.items())),
    )


def in_round(setup: Setup, round: int, rates: Sequence[float]) -> tuple[float, ...]:
    """Drop rates as the run's schedule has them in a round."""
    dropout, progress = setup.config.dropout, (round - 1) / setup.config.rounds
    return scheduled_rates(rates, dropout.schedule, progress, dropout.schedule_part)


def start_with(setup: Setup, adapter: AdapterSpec) -> ServerState:
    """State with a fresh adapter."""
    return ServerState(GlobalModel(adapter, setup.fresh_tensors(adapter)))


def full_plan(
    setup: Setup,
    state: ServerState,
    round: int,
    device: int,
    dropout: LayerDropout | None = None,
) -> Plan:
    """The Plan most methods begin from: the whole global adapter, all of it to be shared."""
    training = setup.config.training
    return Plan(
        round=round,
        device=device,
        adapter=state.model.adapter,
        tensors=state.model.tensors,
        train=None,
        share=frozenset(name for _, name, _ in flatten(state.model.tensors)),
        dropout=dropout,
        objective=Objective(proximal=training.proximal),
        base_delta=state.model.base_delta,
        budget=Budget(steps=training.local_steps, epochs=training.local_epochs),
        training=local_training(setup.config),
        reward_rows=0,
        seed=setup.config.seed,
        nonce=secrets.token_hex(16),
        frozen=setup.config.frozen.count,
        run=setup.run,
        cache=state_cache(setup.config),
    )


def local_training(config: Config) -> LocalTraining:
    """How clients train, as the configuration says it."""
    settings = config.training
    return LocalTraining(
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        schedule=settings.schedule,
        warmup_fraction=settings.warmup_fraction,
        rounds=config.rounds,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        precision=settings.precision,
        checkpointing=settings.checkpointing,
        evaluation_batch_size=config.evaluation.batch_size,
    )


def state_cache(config: Config) -> StateCache | None:
    """How clients store what frozen layers make of their rows, ``None`` where they do not."""
    if not config.frozen.cache:
        return None
    return StateCache(config.frozen.precision, int(config.frozen.limit_mb * 1e6))


def for_each(of_device: OfDevice) -> Callable[[Setup, ServerState, int, Sequence[int]], list[Plan]]:
    """A method's ``plan`` that asks for every device by itself."""

    def plan(setup: Setup, state: ServerState, round: int, cohort: Sequence[int]) -> list[Plan]:
        return [of_device(setup, state, round, device) for device in cohort]

    return plan


def measuring(of_device: OfDevice) -> OfDevice:
    """A method's ``own``: what a device would begin that turn with."""

    def own(setup: Setup, state: ServerState, round: int, device: int) -> Plan:
        return without_steps(of_device(setup, state, round, device))

    return own


def without_steps(plan: Plan) -> Plan:
    """The same model on the device's test rows: nothing is trained, shared or kept."""
    return replace(
        plan,
        budget=Budget(steps=0),
        share=frozenset(),
        sharing=None,
        own_copy=None,
        measure=True,
    )


def average_by_examples(
    setup: Setup, state: ServerState, plans: Sequence[Plan], replies: Sequence[Reply]
) -> ServerState:
    """Every tensor becomes its holders' mean, weighted by the rows they trained on.

    With a server optimiser it moves towards that mean by its rule.
    """
    updates = [reply for reply in replies if isinstance(reply, Update)]
    return with_mean(
        setup, state, updates, average_over_holders(state.model.tensors, updates, by_examples)
    )


def with_mean(
    setup: Setup, state: ServerState, updates: Sequence[Update], mean: Tensors
) -> ServerState:
    """The state after a round of these updates, whose mean by tensor is given."""
    settings, model, others = setup.config.server, state.model, state.alternatives
    if settings.optimizer != "none" and updates:
        sent = {name for update in updates for _, name, _ in flatten(update.tensors)}
        known = {which: others[which].tensors for which in MOMENTS if which in others}
        mean, moments = step(settings, model.tensors, mean, sent, known)
        kept = {which: GlobalModel(model.adapter, tensors) for which, tensors in moments.items()}
        others = {**others, **kept}
    return replace(state, model=replace(model, tensors=mean), alternatives=others)
