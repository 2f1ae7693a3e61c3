"""One device's turn, from a Plan to an Update: the same code on every transport."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import transformers
from torch import nn

from droppeft import seeds
from droppeft.adapters.attach import attach, detach
from droppeft.adapters.by_layer import Parameters, get_tensors, set_tensors, trainable_by_layer
from droppeft.config import Config
from droppeft.data.partition import DeviceRows
from droppeft.data.tables import Rows
from droppeft.data.tasks import Classification
from droppeft.data.tokens import TokenTable
from droppeft.errors import DroppeftError
from droppeft.frozen_prefix import FrozenPrefix, StateStore
from droppeft.frozen_prefix.turn import PrefixOfTurn, content_name, state_folder
from droppeft.layer_dropout import find_blocks, sample_active
from droppeft.models import Backbone
from droppeft.plans import (
    HEAD,
    AdapterSpec,
    BaseDelta,
    LayerKey,
    Layout,
    MeasuredCost,
    Plan,
    PrefixCost,
    Tensors,
    Update,
    flatten,
    restrict,
)
from droppeft.precision import autocast
from droppeft.quantization import is_quantised, on_device
from droppeft.training import (
    ActiveAt,
    Evaluation,
    TrainOutcome,
    evaluate,
    rate_factor,
    train,
    turn_batches,
)


class Workbench:
    """A frozen backbone wearing one adapter at a time.

    All simulated devices of a process share it: a device is its adapter's tensors, not a copy of
    the model.

    Attributes:
        model: backbone with the adapter of the last :meth:`wear`.
        parameters: its trainable parameters by layer.
        blocks: its L layers.
        task: batches, loss and metrics.
    """

    def __init__(self, backbone: Backbone, accelerator: str, seed: int) -> None:
        self._backbone = backbone
        self._seed = seeds.seed_for(seed, purpose="adapter")
        self._spec: AdapterSpec | None = None
        self._fresh: dict[AdapterSpec, Tensors] = {}
        self.device = torch.device(accelerator)
        self.model = on_device(backbone.model, self.device)
        self.parameters: Parameters = {}
        self.blocks: tuple[nn.Module, ...] = ()
        self.task = Classification(
            backbone.inputs, int(backbone.tokenizer.pad_token_id), self.device
        )

    @property
    def weights_hash(self) -> str:
        """Of the backbone's weights."""
        return self._backbone.weights_hash

    @property
    def num_layers(self) -> int:
        """L of the backbone."""
        return self._backbone.num_layers

    def wear(self, spec: AdapterSpec) -> None:
        """Attach an adapter of these shapes, unless it is on already."""
        if spec != self._spec:
            self._change(spec)

    def fresh_tensors(self, spec: AdapterSpec) -> Tensors:
        """Initial values of an adapter of these shapes; they depend on the run's seed alone."""
        if spec not in self._fresh:
            self._change(spec)
        return self._fresh[spec]

    def layout(self, spec: AdapterSpec) -> Layout:
        """The trainable tensors of an adapter of these shapes."""
        return {name: (key, array.shape) for key, name, array in flatten(self.fresh_tensors(spec))}

    def _change(self, spec: AdapterSpec) -> None:
        if self._spec is not None:
            self.model, self._spec = detach(self.model), None
        base = self._backbone
        model = attach(self.model, spec, base.blocks_path, self._seed, base.new_modules)
        model = model.to(self.device)
        path, self.blocks = find_blocks(model)
        self.parameters = trainable_by_layer(model, path)
        self.model, self._spec = model, spec
        self._fresh[spec] = get_tensors(self.parameters)


def take_turn(
    bench: Workbench, table: TokenTable, rows: DeviceRows, config: Config, plan: Plan
) -> Update:
    """Load, train, measure and pack.

    Args:
        bench: may be shared by devices that take turns; left with this device's values.
        table: the tokenised rows that ``rows`` points into.
        rows: this device's own.
        config: of the run; what the Plan says goes first.

    Raises:
        DroppeftError: a Plan that does not fit this device or model.
    """
    start = time.perf_counter()
    bench.wear(plan.adapter)
    parameters = _load(bench, plan)
    with base_delta_applied(bench.model, plan.base_delta):
        before = _validation(bench, table, rows, config, plan)
        outcome, prefix = _train(bench, parameters, table, rows, config, plan)
        after = _validation(bench, table, rows, config, plan)
    tensors = _trained_and_shared(parameters, plan, outcome)
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
        ),
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
    needed = missing if plan.train is None else missing & plan.train
    if needed:
        raise DroppeftError(
            f"round {plan.round}, device {plan.device}: the Plan lacks {min(needed)}, "
            "and this device keeps no tensors of its own"
        )
    set_tensors(bench.parameters, plan.tensors)
    set_tensors(bench.parameters, restrict(fresh, missing))
    trained: dict[LayerKey, dict[str, nn.Parameter]] = {}
    for key, named in bench.parameters.items():
        for name, value in named.items():
            value.requires_grad_(plan.train is None or name in plan.train)
            if value.requires_grad:
                trained.setdefault(key, {})[name] = value
    return trained


def _train(
    bench: Workbench,
    parameters: Parameters,
    table: TokenTable,
    rows: DeviceRows,
    config: Config,
    plan: Plan,
) -> tuple[TrainOutcome, PrefixCost]:
    settings = config.training
    rng = seeds.numpy_generator(plan.seed, purpose="batches", round=plan.round, device=plan.device)
    chosen = turn_batches(rows.train, table, settings.batch_size, plan.budget, rng)
    factors = [
        rate_factor(settings, (plan.round - 1 + (step + 0.5) / len(chosen)) / config.rounds)
        for step in range(len(chosen))
    ]
    prefix = _prefix(bench, table, chosen, config, plan) if plan.frozen else None
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
            _gates(bench, parameters, plan),
            factors,
            bench.task,
            settings,
            plan.objective.proximal,
            prefix,
        )
    if prefix is None:
        return outcome, PrefixCost()
    prefix.close()
    return outcome, prefix.cost


def _prefix(
    bench: Workbench, table: TokenTable, chosen: Sequence[Rows], config: Config, plan: Plan
) -> PrefixOfTurn:
    """The first layers, which nobody trains, with what this device keeps of them."""
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
    return PrefixOfTurn(
        FrozenPrefix(bench.model, bench.blocks, plan.frozen),
        store,
        settings.precision,
        table,
        bench.task,
        chosen,
        partial(autocast, training.precision, bench.device),
    )


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
    chosen = rows.validation[: plan.reward_rows]
    return evaluate(
        bench.model,
        table,
        chosen,
        bench.task,
        config.evaluation.batch_size,
        config.training.precision,
    )


def _trained_and_shared(parameters: Parameters, plan: Plan, outcome: TrainOutcome) -> Tensors:
    """What travels: the tensors the Plan lets go, of layers that ran at least once."""
    trained = {
        key: named
        for key, named in parameters.items()
        if not isinstance(key, int) or outcome.active_steps[key] > 0
    }
    return restrict(get_tensors(trained), plan.share)
