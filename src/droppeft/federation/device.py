"""One device's turn, from a Plan to an Update: the same code on every transport."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import transformers
from torch import nn

from droppeft import seeds
from droppeft.adapters.by_layer import Parameters, get_tensors, set_tensors
from droppeft.config import Config
from droppeft.data.partition import DeviceRows
from droppeft.data.tables import Rows
from droppeft.data.tokens import TokenTable
from droppeft.errors import DroppeftError
from droppeft.federation.layer_scores import Scored, score_layers
from droppeft.federation.workbench import Workbench
from droppeft.frozen_prefix import FrozenPrefix, StateStore
from droppeft.frozen_prefix.turn import PrefixOfTurn, content_name, state_folder
from droppeft.layer_dropout import sample_active
from droppeft.plans import (
    HEAD,
    AdapterSpec,
    BaseDelta,
    Failure,
    LayerKey,
    MeasuredCost,
    Measurement,
    Objective,
    Plan,
    PrefixCost,
    Reply,
    Tensors,
    Update,
    flatten,
    restrict,
)
from droppeft.precision import autocast
from droppeft.quantization import is_quantised
from droppeft.sharing.criteria import CRITERIA
from droppeft.sharing.kept import Lost, folder_of, keep, recall
from droppeft.training import (
    ActiveAt,
    Evaluation,
    TrainOutcome,
    evaluate,
    rate_factor,
    train,
    turn_batches,
)


def carry_out(
    bench: Workbench, table: TokenTable, rows: DeviceRows, config: Config, plan: Plan
) -> Reply:
    """Do what a Plan asks for: a turn, or a measurement.

    Args:
        as :func:`take_turn`.

    Raises:
        DroppeftError: a Plan that does not fit this device or model.
    """
    try:
        take = measure_own if plan.measure else take_turn
        return take(bench, table, rows, config, plan)
    except Lost as error:
        return Failure(plan.device, str(error), lost=True)


def measure_own(
    bench: Workbench, table: TokenTable, rows: DeviceRows, config: Config, plan: Plan
) -> Measurement:
    """Measure this device's model at full depth on rows that it never trains on; keep nothing.

    With a budget of epochs, what it would be after so many of them on this device's rows.

    Args:
        as :func:`take_turn`.

    Raises:
        DroppeftError: as :func:`take_turn`.
    """
    bench.wear(plan.adapter)
    parameters = _load(bench, plan)
    bench.hold()
    batch_size, precision = config.evaluation.batch_size, config.training.precision
    with base_delta_applied(bench.model, plan.base_delta):
        if plan.budget.epochs:
            _train(bench, parameters, table, rows, config, plan)
            bench.hold()
        found = evaluate(bench.model, table, rows.test, bench.task, batch_size, precision)
    return Measurement(plan.round, plan.device, plan.nonce, found.rows, found.accuracy, found.loss)


def take_turn(
    bench: Workbench, table: TokenTable, rows: DeviceRows, config: Config, plan: Plan
) -> Update:
    """Load, train, measure and pack; what the Plan does not let travel is kept on this device.

    Args:
        bench: may be shared by devices that take turns; left with this device's values.
        table: the tokenised rows that ``rows`` points into.
        rows: this device's own.
        config: of the run; what the Plan says goes first.

    Raises:
        DroppeftError: a Plan that does not fit this device or model, or tensors that cannot be
            kept.
        Lost: what this device kept is not there any more.
    """
    start = time.perf_counter()
    bench.wear(plan.adapter)
    parameters = _load(bench, plan)
    if plan.base_delta is not None:
        bench.hold()  # what is added to is then where it will be used
    with base_delta_applied(bench.model, plan.base_delta):
        start_values = get_tensors(parameters) if _reads(plan) == "start" else {}
        before = _validation(bench, table, rows, config, plan)
        outcome, prefix = _train(bench, parameters, table, rows, config, plan)
        after = _validation(bench, table, rows, config, plan)
        scored = _choose(bench, parameters, table, rows, config, plan, outcome, start_values)
    kept = frozenset() if scored is None else _names_of(bench.parameters, scored.kept)
    tensors = _trained_and_shared(parameters, plan, kept, outcome)
    _keep_the_rest(bench, parameters, plan, kept)
    own = _train_own_copy(bench, parameters, table, rows, config, plan)
    return Update(
        round=plan.round,
        device=plan.device,
        nonce=plan.nonce,
        tensors=tensors,
        examples=outcome.examples,
        steps=outcome.steps,
        active_steps=outcome.active_steps,
        importance=outcome.importance,
        train_loss=outcome.loss,
        reward=before.loss - after.loss if before and after else None,
        cost=MeasuredCost(
            turn_wall_s=time.perf_counter() - start,
            train_wall_s=outcome.wall_s,
            reward_wall_s=sum(measured.wall_s for measured in (before, after) if measured),
            activation_bytes_peak=outcome.activation_bytes_peak,
            tokens=outcome.tokens,
            rows=outcome.rows,
            layer_tokens=outcome.layer_tokens,
            reward_tokens=sum(measured.tokens for measured in (before, after) if measured),
            prefix=prefix,
            scoring_tokens=0 if scored is None else scored.tokens,
            scoring_wall_s=0.0 if scored is None else scored.wall_s,
            own_steps=0 if own is None else own.steps,
            own_tokens=0 if own is None else own.tokens,
            own_wall_s=0.0 if own is None else own.wall_s,
        ),
        shared=None if scored is None else scored.shared,
        scores=None if scored is None else scored.scores,
    )


def rehearse(bench: Workbench, table: TokenTable, config: Config, spec: AdapterSpec) -> None:
    """Take a step that moves nothing, where settings ask for more than every model and adapter can.

    Some adapters answer in fp32 where a model counts on what autocast makes: DeBERTa-v2 then fails.

    Args:
        bench: left with whatever values it has.
        table: the rows of the step are its first ones.

    Raises:
        DroppeftError: the step failed; with what to set.
    """
    settings = config.training
    if settings.precision == "fp32" and not settings.checkpointing:
        return
    bench.wear(spec)
    bench.hold()
    batch = bench.task.collate(table, np.arange(min(2, len(table))))
    every = (True,) * bench.num_layers
    try:
        with torch.random.fork_rng():
            train(
                bench.model,
                bench.blocks,
                bench.parameters,
                [batch],
                lambda step: every,
                [0.0],
                bench.task,
                settings,
            )
    except RuntimeError as error:
        checkpointing = str(settings.checkpointing).lower()
        raise DroppeftError(
            f"adapter.type={config.adapter.type} on this model cannot be trained with "
            f"training.precision={settings.precision} and training.checkpointing={checkpointing} "
            f"({str(error).strip().partition(chr(10))[0]}); use fp32 and false, or another type"
        ) from None


@contextmanager
def base_delta_applied(model: nn.Module, delta: BaseDelta | None) -> Iterator[None]:
    """Add a delta to the frozen backbone inside; afterwards its bits are the old ones.

    The old values are kept, not recomputed: w + d − d is not w in floating point.

    Raises:
        DroppeftError: a name or shape that the backbone does not have, or a quantised weight.
    """
    if delta is None:
        yield
        return
    own = {_own_name(name): value for name, value in model.named_parameters()}
    for name, array in delta.tensors.items():
        if name in own and is_quantised(own[name]):
            raise DroppeftError(
                f"base delta {delta.version}: {name} is quantised, and nothing can be added to it; "
                "set quantization=none, or take a method without base deltas"
            )
        if name not in own or tuple(own[name].shape) != array.shape:
            raise DroppeftError(f"base delta {delta.version}: {name} does not fit the backbone")
    kept = {name: own[name].detach().clone() for name in delta.tensors}
    try:
        with torch.no_grad():
            for name, array in delta.tensors.items():
                own[name].add_(torch.from_numpy(array).to(own[name]))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                own[name].copy_(value)


def _own_name(name: str) -> str:
    """A parameter's name before peft wrapped its module."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _load(bench: Workbench, plan: Plan) -> Parameters:
    """Set all values of the turn; return the parameters that it trains.

    Raises:
        DroppeftError: a tensor is to be trained and the Plan has no value for it.
    """
    fresh = bench.fresh_tensors(plan.adapter)
    sent = {name for _, name, _ in flatten(plan.tensors)}
    missing = frozenset(name for _, name, _ in flatten(fresh)) - sent
    kept = _kept(plan, missing)
    own = {name for _, name, _ in flatten(kept)}
    needed = (missing if plan.train is None else missing & plan.train) - own
    if needed:
        raise DroppeftError(
            f"round {plan.round}, device {plan.device}: the Plan lacks {min(needed)}, "
            "and this device has not kept it"
        )
    set_tensors(bench.parameters, plan.tensors)
    set_tensors(bench.parameters, kept)
    set_tensors(bench.parameters, restrict(fresh, missing - own))
    trained: dict[LayerKey, dict[str, nn.Parameter]] = {}
    for key, named in bench.parameters.items():
        for name, value in named.items():
            value.requires_grad_(plan.train is None or name in plan.train)
            if value.requires_grad:
                trained.setdefault(key, {})[name] = value
    return trained


def _kept(plan: Plan, missing: frozenset[str]) -> Tensors:
    """Of what this device keeps, the tensors that the Plan does not bring."""
    if plan.kept is None:
        return {}
    return restrict(recall(folder_of(plan.run, plan.device), plan.kept), missing)


def _choose(
    bench: Workbench,
    parameters: Parameters,
    table: TokenTable,
    rows: DeviceRows,
    config: Config,
    plan: Plan,
    outcome: TrainOutcome,
    start_values: Tensors,
) -> Scored | None:
    """Score the layers and choose those that are shared, if the Plan leaves it to the device."""
    if plan.sharing is None:
        return None
    bench.hold()

    def measure() -> Evaluation:
        rule, settings = plan.sharing, config.evaluation
        chosen = rows.validation[: rule.score_rows if rule else 0]
        precision = config.training.precision
        return evaluate(bench.model, table, chosen, bench.task, settings.batch_size, precision)

    return score_layers(bench, parameters, plan, outcome, start_values, measure)


def _reads(plan: Plan) -> str:
    """What the rule's criterion needs to be collected during the turn."""
    return "" if plan.sharing is None else CRITERIA[plan.sharing.criterion].reads


def _names_of(parameters: Parameters, layers: Collection[LayerKey]) -> frozenset[str]:
    return frozenset(name for key in layers for name in parameters.get(key, {}))


def _keep_the_rest(
    bench: Workbench, parameters: Parameters, plan: Plan, kept: frozenset[str]
) -> None:
    """Keep all that was to be trained and may not travel, and whole layers that are not shared.

    Args:
        parameters: those that were to be trained.
        kept: names of the layers that are not shared, in this turn trained or not.
    """
    trained = frozenset(name for named in parameters.values() for name in named)
    own = (trained - plan.share) | kept
    if own:
        tensors = restrict(get_tensors(bench.parameters), own)
        keep(folder_of(plan.run, plan.device), plan.round, plan.kept, tensors)


def _train_own_copy(
    bench: Workbench,
    parameters: Parameters,
    table: TokenTable,
    rows: DeviceRows,
    config: Config,
    plan: Plan,
) -> TrainOutcome | None:
    """Go on with a whole adapter of this device's own, on the same batches, and keep it."""
    if plan.own_copy is None:
        return None
    folder = folder_of(plan.run, plan.device)
    own = plan.tensors if plan.kept is None else recall(folder, plan.kept)
    set_tensors(bench.parameters, own)
    alone = replace(plan, objective=Objective(proximal=plan.own_copy), sharing=None)
    with base_delta_applied(bench.model, plan.base_delta):
        outcome, _ = _train(bench, parameters, table, rows, config, alone, anchors=plan.tensors)
    keep(folder, plan.round, plan.kept, get_tensors(bench.parameters))
    return outcome


def _train(
    bench: Workbench,
    parameters: Parameters,
    table: TokenTable,
    rows: DeviceRows,
    config: Config,
    plan: Plan,
    anchors: Tensors | None = None,
) -> tuple[TrainOutcome, PrefixCost]:
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
            with_mean_gradient=_reads(plan) == "mean gradient",
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


def _validation(
    bench: Workbench, table: TokenTable, rows: DeviceRows, config: Config, plan: Plan
) -> Evaluation | None:
    """Measure at full depth on the first rows of the validation part, if the Plan says so."""
    if plan.reward_rows == 0:
        return None
    bench.hold()
    chosen = rows.validation[: plan.reward_rows]
    return evaluate(
        bench.model,
        table,
        chosen,
        bench.task,
        config.evaluation.batch_size,
        config.training.precision,
    )


def _trained_and_shared(
    parameters: Parameters, plan: Plan, kept: frozenset[str], outcome: TrainOutcome
) -> Tensors:
    """What travels: the tensors that Plan and device let go, of layers that ran at least once."""
    trained = {
        key: named
        for key, named in parameters.items()
        if not isinstance(key, int) or outcome.active_steps[key] > 0
    }
    return restrict(get_tensors(trained), plan.share - kept)
