"""What a federated method is: functions that create, use and update a server state.

A method is a :class:`Method`, a frozen dataclass of functions. :attr:`Method.init` creates the
state, :attr:`Method.instruct` writes the instructions of a round, and :attr:`Method.merge` merges
the replies into the next state. Methods differ in these functions only: the round loop and the
clients are the same for all of them. The design follows fedjax's ``FederatedAlgorithm``.

The functions below the class are what most methods are composed of.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from droppeft.config import AdapterConfig, Config
from droppeft.costs.modelled_clock import Clock
from droppeft.costs.step_counts import StepCounts
from droppeft.errors import DroppeftError
from droppeft.layer_dropout import Calibration
from droppeft.messages.instruction import (
    AdapterSpec,
    Budget,
    Instruction,
    LayerAdapter,
    LayerDropout,
    LocalTraining,
    Objective,
    StateCache,
)
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import GlobalModel, NoMemory, ServerState
from droppeft.messages.tensors import Layout, Tensors, flatten
from droppeft.sharing.aggregation import average_over_senders, by_targets
from droppeft.sharing.server_optimizer import MOMENTS, step


@dataclass(frozen=True)
class Setup:
    """What the functions of a method know about the run.

    Attributes:
        config: the run's configuration.
        num_layers: number L of layers of the backbone.
        fresh_tensors: returns the initial values of an adapter, which follow from the run's seed.
        layout: returns the names, layers and shapes of an adapter's tensors.
        clock: models how long a local training takes on each client's device profile; ``None`` if
            the model's operations cannot be counted. Methods decide about time by this clock and
            not by measured times, so that the seed determines the run.
        run: name of the run, under which clients save their state.
        longest_step: returns the counts of a training step on the longest rows, in the run's
            precision and quantisation. Methods use it to decide what fits into a device's memory.
        calibration: what each layer is worth, measured before round 1 on rows that no client has;
            ``None`` if the configuration asks for none (``Config.calibrates``). A resumed run has
            the values of its checkpoint.
    """

    config: Config
    num_layers: int
    fresh_tensors: Callable[[AdapterSpec], Tensors]
    layout: Callable[[AdapterSpec], Layout]
    clock: Clock | None
    run: str = ""
    longest_step: Callable[[AdapterSpec], StepCounts] | None = None
    calibration: Calibration | None = None


ForClient = Callable[[Setup, ServerState, int, int], Instruction]
"""Returns the instruction for a client: (setup, state, round, client)."""


def _global_model(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
    return evaluation_only(full_instruction(setup, state, round, client))


@dataclass(frozen=True)
class Method:
    """A federated method.

    Attributes:
        name: the name on the command line.
        summary: one line of help.
        tables: names of the optional configuration tables that the method uses. A setting of
            another optional table is refused.
        init: returns the state before round 1. The configuration has passed :attr:`check`. If the
            model's number of layers makes the run impossible, ``init`` itself must raise, so that
            nothing is written for a run that cannot start.
        instruct: returns one instruction per client of the cohort, in the cohort's order. It
            depends on its arguments alone (except for nonces), and only its instructions carry
            what it decided.
        merge: returns the state after a round. The replies are in the order of the instructions.
            A refused Update is a Failure there, and all replies may be Failures.
        check: raises a DroppeftError for a configuration that the method cannot run with any
            model. :mod:`droppeft.methods.rules` calls it before anything is loaded.
        adjust: returns the configuration that the run uses instead of the given one. Adjusting
            an adjusted configuration changes nothing.
        evaluate_client: returns the instruction that evaluates a client's model as it would be at
            the start of a local training in that round. If clients save no tensors, this is the
            global model.
        has_global_model: whether, with this configuration, the state's model is a complete global
            model. Otherwise the model, or its head, only gives clients their initial values.
        note: returns values about the last round for the ledger, or ``None``.
        lora_options: of a method that computes with LoRA's A and B, the options of LoRA under which
            its arithmetic holds; ``None`` for a method that merges tensors, whatever they mean.
            :mod:`droppeft.methods.rules` refuses other types and options.
        sent: names of the tensors that some client may send, with a configuration for which
            :attr:`merge` takes the mean of each tensor and uses nothing else of a reply. ``None``
            for a method that uses more, which cannot be differentially private.
        memory_type: class of ``ServerState.memory``: a frozen dataclass of numbers, strings,
            tuples, mappings and such dataclasses, which checkpoints store as JSON.
    """

    name: str
    summary: str
    tables: frozenset[str]
    init: Callable[[Setup], ServerState]
    instruct: Callable[[Setup, ServerState, int, Sequence[int]], list[Instruction]]
    merge: Callable[[Setup, ServerState, Sequence[Instruction], Sequence[Reply]], ServerState]
    check: Callable[[Config], None] = lambda config: None
    adjust: Callable[[Config], Config] = lambda config: config
    evaluate_client: ForClient = _global_model
    has_global_model: Callable[[Config], bool] = lambda config: True
    note: Callable[[Setup, ServerState], Mapping[str, Any] | None] = lambda setup, state: None
    lora_options: frozenset[str] | None = None
    sent: Callable[[ServerState], frozenset[str]] | None = None
    memory_type: type = NoMemory


def uniform_adapter(setup: Setup) -> AdapterSpec:
    """Return an adapter with the configured type in every layer that is not frozen.

    Raises:
        DroppeftError: all layers are frozen.
    """
    frozen = setup.config.frozen.count
    if frozen >= setup.num_layers:
        raise DroppeftError(
            f"frozen.layers={frozen} leaves none of the {setup.num_layers} layers to train; "
            "lower it"
        )
    return adapter_spec(setup.config.adapter, setup.num_layers, frozen)


def adapter_spec(chosen: AdapterConfig, num_layers: int, frozen: int = 0) -> AdapterSpec:
    """Return an adapter that is the same in all layers, without one in the first ``frozen``."""
    layer = LayerAdapter(type=chosen.type, rank=chosen.rank, width=chosen.width)
    return AdapterSpec(
        layers=(None,) * frozen + (layer,) * (num_layers - frozen),
        alpha=chosen.alpha,
        dropout=chosen.dropout,
        targets=chosen.targets,
        tokens=chosen.tokens,
        options=tuple(sorted(chosen.options.items())),
    )


def start_with(setup: Setup, adapter: AdapterSpec) -> ServerState:
    """Return a state whose global model is an adapter with its initial values."""
    return ServerState(GlobalModel(adapter, setup.fresh_tensors(adapter)))


def full_instruction(
    setup: Setup,
    state: ServerState,
    round: int,
    client: int,
    dropout: LayerDropout | None = None,
) -> Instruction:
    """Return an instruction to train the whole global model and share all of its tensors.

    Most methods begin with it and replace some of its fields.
    """
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
        starts=(state.model.adapter.first_layer,),
        cache=state_cache(setup.config),
        encoding=setup.config.traffic.encoding,
    )


def local_training(config: Config) -> LocalTraining:
    """Return the configured settings of local training."""
    settings = config.training
    return LocalTraining(
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        schedule=settings.schedule,
        warmup_fraction=settings.warmup_fraction,
        rounds=config.rounds,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        precision=settings.computed_in,
        backbone_dropout=settings.backbone_dropout,
        checkpointing=settings.checkpointing,
        evaluation_batch_size=config.evaluation.batch_size,
    )


def state_cache(config: Config) -> StateCache | None:
    """Return how clients cache the output of frozen layers, or ``None`` if they do not."""
    if not config.frozen.cache:
        return None
    return StateCache(config.frozen.precision, int(config.frozen.limit_mb * 1e6))


def all_tensors(state: ServerState) -> frozenset[str]:
    """Return the names of all tensors of the global model, as a :attr:`Method.sent`."""
    return frozenset(name for _, name, _ in flatten(state.model.tensors))


def per_client(
    for_client: ForClient,
) -> Callable[[Setup, ServerState, int, Sequence[int]], list[Instruction]]:
    """Return an :attr:`Method.instruct` that writes each client's instruction independently."""

    def instruct(
        setup: Setup, state: ServerState, round: int, cohort: Sequence[int]
    ) -> list[Instruction]:
        return [for_client(setup, state, round, client) for client in cohort]

    return instruct


def evaluating(for_client: ForClient) -> ForClient:
    """Return an :attr:`Method.evaluate_client` for the model that ``for_client`` would train."""

    def evaluate_client(setup: Setup, state: ServerState, round: int, client: int) -> Instruction:
        return evaluation_only(for_client(setup, state, round, client))

    return evaluate_client


def evaluation_only(instruction: Instruction) -> Instruction:
    """Return an instruction that evaluates the same model; nothing is trained, sent or saved."""
    return replace(
        instruction,
        budget=Budget(steps=0),
        share=frozenset(),
        sharing=None,
        personal_adapter=None,
        evaluate_only=True,
    )


def average_by_targets(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    """Return the state in which each tensor is the mean over the clients that sent it.

    Clients are weighted by the number of predictions that they trained on: rows, or the tokens of
    completions. With a server optimiser, the tensors move towards this mean by the optimiser's
    rule.
    """
    updates = [reply for reply in replies if isinstance(reply, Update)]
    return apply_mean(
        setup, state, updates, average_over_senders(state.model.tensors, updates, by_targets)
    )


def apply_mean(
    setup: Setup, state: ServerState, updates: Sequence[Update], mean: Tensors
) -> ServerState:
    """Return the state after a round, given its updates and the mean of each tensor."""
    settings, model, others = setup.config.server, state.model, state.alternatives
    if settings.optimizer != "none" and updates:
        sent = {name for update in updates for _, name, _ in flatten(update.tensors)}
        known = {which: others[which].tensors for which in MOMENTS if which in others}
        mean, moments = step(settings, model.tensors, mean, sent, known)
        stored = {which: GlobalModel(model.adapter, tensors) for which, tensors in moments.items()}
        others = {**others, **stored}
    return replace(state, model=replace(model, tensors=mean), alternatives=others)
