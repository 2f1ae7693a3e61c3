"""One device's turn, from a Plan to an Update: the same code on every transport."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from droppeft import seeds
from droppeft.adapters.attach import attach, detach
from droppeft.adapters.by_layer import Parameters, get_tensors, set_tensors, trainable_by_layer
from droppeft.config import Config
from droppeft.data.partition import DeviceRows
from droppeft.data.tasks import Classification
from droppeft.data.tokens import TokenTable
from droppeft.errors import DroppeftError
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
    Tensors,
    Update,
    flatten,
    restrict,
)
from droppeft.training import ActiveAt, TrainOutcome, evaluate, rate_factor, train, turn_batches


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
        self.model: nn.Module = backbone.model.to(self.device)
        self.parameters: Parameters = {}
        self.blocks: tuple[nn.Module, ...] = ()
        self.task = Classification(
            backbone.inputs, int(backbone.tokenizer.pad_token_id), self.device
        )

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
        before, reward_wall_s = _validation_loss(bench, table, rows, config, plan)
        outcome = _train(bench, parameters, table, rows, config, plan)
        after, again_wall_s = _validation_loss(bench, table, rows, config, plan)
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
        reward=None if before is None or after is None else before - after,
        cost=MeasuredCost(
            turn_wall_s=time.perf_counter() - start,
            train_wall_s=outcome.wall_s,
            reward_wall_s=reward_wall_s + again_wall_s,
            activation_bytes_peak=outcome.activation_bytes_peak,
            tokens=outcome.tokens,
        ),
    )


@contextmanager
def base_delta_applied(model: nn.Module, delta: BaseDelta | None) -> Iterator[None]:
    """Add a delta to the frozen backbone inside; afterwards its bits are the old ones.

    The old values are kept, not recomputed: w + d − d is not w in floating point.

    Raises:
        DroppeftError: a name or shape that the backbone does not have.
    """
    if delta is None:
        yield
        return
    own = {_own_name(name): value for name, value in model.named_parameters()}
    for name, array in delta.tensors.items():
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
) -> TrainOutcome:
    settings = config.training
    rng = seeds.numpy_generator(plan.seed, purpose="batches", round=plan.round, device=plan.device)
    chosen = turn_batches(rows.train, table, settings.batch_size, plan.budget, rng)
    factors = [
        rate_factor(settings, (plan.round - 1 + (step + 0.5) / len(chosen)) / config.rounds)
        for step in range(len(chosen))
    ]
    with torch.random.fork_rng():
        # For dropout inside the backbone and the adapter: torch's global generator is theirs.
        torch.manual_seed(
            seeds.seed_for(plan.seed, purpose="modules", round=plan.round, device=plan.device)
        )
        return train(
            bench.model,
            bench.blocks,
            parameters,
            [bench.task.collate(table, batch) for batch in chosen],
            _gates(bench, parameters, plan),
            factors,
            bench.task,
            settings,
            plan.objective.proximal,
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


def _validation_loss(
    bench: Workbench, table: TokenTable, rows: DeviceRows, config: Config, plan: Plan
) -> tuple[float | None, float]:
    """Loss at full depth on the first rows of the validation part, and what it took."""
    if plan.reward_rows == 0:
        return None, 0.0
    chosen = rows.validation[: plan.reward_rows]
    measured = evaluate(
        bench.model,
        table,
        chosen,
        bench.task,
        config.evaluation.batch_size,
        config.training.precision,
    )
    return measured.loss, measured.wall_s


def _trained_and_shared(parameters: Parameters, plan: Plan, outcome: TrainOutcome) -> Tensors:
    """What travels: the tensors the Plan lets go, of layers that ran at least once."""
    trained = {
        key: named
        for key, named in parameters.items()
        if not isinstance(key, int) or outcome.active_steps[key] > 0
    }
    return restrict(get_tensors(trained), plan.share)
