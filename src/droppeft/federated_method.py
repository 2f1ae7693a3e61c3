"""What a federated method is: three functions over explicit state; the engine is a detail.

The shape follows fedjax's federated algorithm: a method is a value, not a class to inherit from.
Methods differ by the instructions they write and by how they merge; neither the round loop nor the
client knows which method it serves.
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
    Instruction,
    LayerAdapter,
    LayerDropout,
    Layout,
    LocalTraining,
    NoMemory,
    Objective,
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
        clock: what turns take on the clients that the run stands for; ``None`` for a model whose
            arithmetic cannot be counted. Decisions about time are made by it and not by what this
            machine measured, so that a seed determines a run.
        run: names the run where clients keep something for it.
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


ForClient = Callable[[Setup, ServerState, int, int], Instruction]
"""The instruction for a client in a round."""


def _as_it_is(config: Config) -> Config:
    return config


def _always(config: Config) -> bool:
    return True


def _nothing(setup: Setup, state: ServerState) -> None:
    return None


def _all_is_well(config: Config) -> None:
    return None


def _global_model(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    return without_steps(full_instruction(setup, state, round, client))


@dataclass(frozen=True)
class Method:
    """A federated method.

    Attributes:
        name: as on the command line.
        summary: one line for people.
        tables: optional tables of the configuration that it reads; a setting of another is
            refused.
        init: state before round 1, of a configuration that passed :attr:`check`. Must raise what
            :attr:`instruct` would raise for a number of layers that cannot work, so that nothing is
            written for a run that cannot start.
        plan: one instruction per member of the cohort, in its order; a function of its arguments
            alone, since what it decides is only remembered in the instructions.
        merge: the state after a round, from its instructions and, in the same order, their
            replies; an Update that was refused is a Failure there, and perhaps all are.
        check: raises a DroppeftError for a configuration that it cannot work with, whatever the
            model; :mod:`droppeft.methods.rules` calls it before anything is loaded.
        adjust: the configuration that its run has instead of the given one; of an adjusted one it
            makes nothing else.
        evaluate_client: the instruction that measures a client's own model, as it would begin the
            turn of that round: the global model, where clients keep nothing to themselves.
        has_global_model: of a configuration; otherwise the state's model, or its head, is only
            where clients begin.
        note: plain values about the last round that a reader wants in the ledger, or ``None``.
        memory_type: class of the state's memory: a frozen dataclass of numbers, texts, tuples,
            mappings and dataclasses of such, which checkpoints hold as JSON.
    """

    name: str
    summary: str
    tables: frozenset[str]
    init: Callable[[Setup], ServerState]
    instruct: Callable[[Setup, ServerState, int, Sequence[int]], list[Instruction]]
    merge: Callable[[Setup, ServerState, Sequence[Instruction], Sequence[Reply]], ServerState]
    check: Callable[[Config], None] = _all_is_well
    adjust: Callable[[Config], Config] = _as_it_is
    evaluate_client: ForClient = _global_model
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


def full_instruction(
    setup: Setup,
    state: ServerState,
    round: int,
    client: int,
    dropout: LayerDropout | None = None,
) -> Instruction:
    """The instruction most methods begin from: the whole global adapter, all of it to be shared."""
    training = setup.config.training
    return Instruction(
        round=round,
        client=client,
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


def for_each(
    for_client: ForClient,
) -> Callable[[Setup, ServerState, int, Sequence[int]], list[Instruction]]:
    """A method's ``plan`` that asks for every client by itself."""

    def instruction(
        setup: Setup, state: ServerState, round: int, cohort: Sequence[int]
    ) -> list[Instruction]:
        return [for_client(setup, state, round, client) for client in cohort]

    return instruction


def evaluating(for_client: ForClient) -> ForClient:
    """A method's ``own``: what a client would begin that turn with."""

    def own(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
        return without_steps(for_client(setup, state, round, client))

    return own


def without_steps(instruction: Instruction) -> Instruction:
    """The same model on the client's test rows: nothing is trained, shared or kept."""
    return replace(
        instruction,
        budget=Budget(steps=0),
        share=frozenset(),
        sharing=None,
        personal_adapter=None,
        measure=True,
    )


def average_by_examples(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
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
