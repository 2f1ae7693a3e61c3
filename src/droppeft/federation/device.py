"""One device's turn, from a Plan to an Update: the same code on every transport."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from droppeft.adapters.by_layer import Parameters, backbone_name, get_tensors, set_tensors
from droppeft.config import Config
from droppeft.data.partition import DeviceRows
from droppeft.data.tables import Rows
from droppeft.data.tokens import TokenTable
from droppeft.errors import DroppeftError
from droppeft.federation.layer_scores import score_layers
from droppeft.federation.turn_training import reads, train_turn
from droppeft.federation.workbench import Workbench
from droppeft.plans import (
    AdapterSpec,
    BaseDelta,
    Failure,
    LayerKey,
    MeasuredCost,
    Measurement,
    Objective,
    Plan,
    Reply,
    Tensors,
    Update,
    flatten,
    restrict,
)
from droppeft.quantization import is_quantised
from droppeft.sharing.kept import Lost, folder_of, keep, recall
from droppeft.training import (
    Evaluation,
    TrainOutcome,
    evaluate,
    train,
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
    """Measure this device's model at full depth on rows that it never trains on.

    With a budget of epochs, what it would be after so many of them on this device's rows. Nothing
    of that is kept but states of the frozen prefix.

    Args:
        as :func:`take_turn`.

    Raises:
        DroppeftError: as :func:`take_turn`.
    """
    bench.wear(plan.adapter)
    parameters = _load(bench, plan)
    bench.hold()
    with base_delta_applied(bench.model, plan.base_delta):
        if plan.budget.epochs:
            train_turn(bench, parameters, table, rows, config, plan)
        found = _evaluate(bench, table, rows.test, config)
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

    def measure(count: int) -> Evaluation:
        return _evaluate(bench, table, rows.validation[:count], config)

    with base_delta_applied(bench.model, plan.base_delta):
        start_values = get_tensors(parameters) if reads(plan) == "start" else {}
        before = measure(plan.reward_rows) if plan.reward_rows else None
        outcome, prefix = train_turn(bench, parameters, table, rows, config, plan)
        after = measure(plan.reward_rows) if plan.reward_rows else None
        scored = score_layers(bench, parameters, plan, outcome, start_values, measure)
    kept = _names_of(bench.parameters, scored.kept if scored else ())
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
            scoring_tokens=scored.tokens if scored else 0,
            scoring_wall_s=scored.wall_s if scored else 0.0,
            own_steps=own.steps if own else 0,
            own_tokens=own.tokens if own else 0,
            own_wall_s=own.wall_s if own else 0.0,
        ),
        shared=scored.shared if scored else None,
        scores=scored.scores if scored else None,
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

    The old values are kept, not recomputed: w + d − d is not w in floating point. What is added to
    a linear map is (out, in), also where the backbone keeps it the other way round (GPT-2).

    Raises:
        DroppeftError: a name or shape that the backbone does not have, or a quantised weight.
    """
    if delta is None:
        yield
        return
    own = {backbone_name(name): value for name, value in model.named_parameters()}
    turned = {
        backbone_name(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    }
    added = {name: array.T if name in turned else array for name, array in delta.tensors.items()}
    for name, array in added.items():
        if name in own and is_quantised(own[name]):
            raise DroppeftError(
                f"base delta {delta.version}: {name} is quantised, and nothing can be added to it; "
                "set quantization=none, or take a method without base deltas"
            )
        if name not in own or tuple(own[name].shape) != array.shape:
            raise DroppeftError(f"base delta {delta.version}: {name} does not fit the backbone")
    kept = {name: own[name].detach().clone() for name in added}
    try:
        with torch.no_grad():
            for name, array in added.items():
                own[name].add_(torch.from_numpy(array).to(own[name]))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                own[name].copy_(value)


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
        outcome, _ = train_turn(bench, parameters, table, rows, config, alone, anchors=plan.tensors)
    keep(folder, plan.round, plan.kept, get_tensors(bench.parameters))
    return outcome


def _evaluate(bench: Workbench, table: TokenTable, rows: Rows, config: Config) -> Evaluation:
    """Measure at full depth on some of the device's rows."""
    bench.hold()
    batch_size, precision = config.evaluation.batch_size, config.training.precision
    return evaluate(bench.model, table, rows, bench.task, batch_size, precision)


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
