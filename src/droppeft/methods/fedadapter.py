"""FedAdapter: bottleneck adapters that grow during the run, in depth (from the output) and width.

From the paper (arXiv:2205.10162): the cohort is split into trial groups. One group keeps the
current depth and width, one has adapters in one more layer, one has adapters that are 8 wider. All
groups get equal time; after a trial the model of the best group continues. Clients cache the hidden
states of the layers below all adapters.

Ours, where the paper does not say it: the initial depth and width; a trial takes 3 rounds; clients
change groups from round to round; equal time is modelled time, reached by the number of steps; the
best group has the largest mean decrease of the loss on its clients' validation rows; new layers and
new width start as fresh adapters, which do not change the output until they are trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft.config import Config
from droppeft.costs.modelled_clock import compute_seconds
from droppeft.errors import DroppeftError
from droppeft.federated_method import Method, Setup, adapter_spec, full_instruction, start_with
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.reply import Reply, Update
from droppeft.messages.server_state import GlobalModel, ServerState
from droppeft.messages.tensors import Array, Tensors
from droppeft.sharing.aggregation import average_over_senders, by_targets

FIRST_DEPTH, FIRST_WIDTH, WIDER_BY, MOST_DEPTH = 2, 8, 8, 12
TRIAL_ROUNDS, REWARD_ROWS = 3, 32
SAME, DEEPER, WIDER = "same", "deeper", "wider"


@dataclass(frozen=True)
class Trial:
    """The current trial, which is the method's memory.

    Attributes:
        depth, width: of the adapters from which all groups began.
        rounds: rounds of this trial that are over.
        rewards: per group, the sum of its clients' rewards.
        counts: per group, the number of these rewards.
    """

    depth: int
    width: int
    rounds: int
    rewards: Mapping[str, float]
    counts: Mapping[str, int]

    @property
    def best(self) -> str:
        """The group with the largest mean reward; among equals, the one that grows less."""
        means = {
            group: self.rewards[group] / count for group, count in self.counts.items() if count > 0
        }
        return max(means, key=lambda group: means[group], default=SAME)


def _check(config: Config) -> None:
    chosen, method = config.adapter, config.method
    if chosen.type != "bottleneck":
        raise DroppeftError(
            f"method={method} needs bottleneck adapters, but adapter.type={chosen.type}; "
            "set adapter.type=bottleneck"
        )
    if config.frozen.layers:
        raise DroppeftError(
            f"method={method} chooses the frozen layers itself; leave "
            f"frozen.layers={config.frozen.layers} out"
        )
    if config.training.local_epochs is not None:
        raise DroppeftError(
            "method=fedadapter gives its groups equal time by their number of steps; set "
            "training.local_steps instead of training.local_epochs"
        )
    if config.server.merge != "mean":
        raise DroppeftError(
            "method=fedadapter compares groups of clients with different adapters, and "
            f"server.merge={config.server.merge} takes all clients for one group; leave "
            "server.merge out"
        )
    if 0 < config.cohort_size < 3:
        raise DroppeftError(
            "method=fedadapter splits the cohort into three groups, but "
            f"cohort_size={config.cohort_size}; set it to 3 or more"
        )


def _first_shape(setup: Setup) -> tuple[int, int]:
    """Initial depth and width of the adapters."""
    width = setup.config.adapter.width or FIRST_WIDTH
    return min(FIRST_DEPTH, setup.num_layers), min(FIRST_WIDTH, width)


def _largest_shape(setup: Setup) -> tuple[int, int]:
    """Largest depth and width of the adapters."""
    return min(MOST_DEPTH, setup.num_layers), setup.config.adapter.width or FIRST_WIDTH


def _plain_mean(model: GlobalModel, replies: Sequence[Reply]) -> GlobalModel:
    """The model with every tensor averaged over the updates that have it, weighted by rows."""
    updates = [reply for reply in replies if isinstance(reply, Update)]
    return replace(model, tensors=average_over_senders(model.tensors, updates, by_targets))


def _init(setup: Setup) -> ServerState:
    depth, width = _first_shape(setup)
    return _begin_trial(setup, start_with(setup, _spec_of(setup, depth, width)).model, depth, width)


def _spec_of(setup: Setup, depth: int, width: int) -> AdapterSpec:
    """Bottleneck adapters of this width in the last ``depth`` layers."""
    chosen = setup.config.adapter.model_copy(update={"width": width})
    return adapter_spec(chosen, setup.num_layers, setup.num_layers - depth)


def _shapes(setup: Setup, depth: int, width: int) -> dict[str, tuple[int, int]]:
    """Depth and width of each group's adapters; what is at its limit has no group."""
    shapes = {SAME: (depth, width)}
    deepest, widest = _largest_shape(setup)
    if depth < deepest:
        shapes[DEEPER] = (depth + 1, width)
    if width < widest:
        shapes[WIDER] = (depth, min(width + WIDER_BY, widest))
    return shapes


def _begin_trial(setup: Setup, model: GlobalModel, depth: int, width: int) -> ServerState:
    """The state at the start of a trial.

    All groups compute the same function: what is new in an adapter does not change the output yet.
    """
    groups = _shapes(setup, depth, width)
    larger = {
        group: _grown(setup, model, _spec_of(setup, *shape))
        for group, shape in groups.items()
        if group != SAME
    }
    trial = Trial(depth, width, 0, dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0))
    return ServerState(model, larger, trial)


def _grown(setup: Setup, model: GlobalModel, spec: AdapterSpec) -> GlobalModel:
    """The model with a larger adapter, fresh where the smaller adapter has no values."""
    fresh = setup.fresh_tensors(spec)
    tensors: Tensors = {
        key: {
            name: _with_corner(value, model.tensors.get(key, {}).get(name))
            for name, value in named.items()
        }
        for key, named in fresh.items()
    }
    return GlobalModel(spec, tensors, model.base_delta)


def _with_corner(larger: Array, smaller: Array | None) -> Array:
    """A copy of the larger array whose first entries in each dimension are the smaller array."""
    if smaller is None:
        return larger
    result = np.array(larger)
    result[tuple(slice(size) for size in smaller.shape)] = smaller
    return result


def _trial(state: ServerState) -> Trial:
    trial: Trial = state.memory
    return trial


def _model(state: ServerState, group: str) -> GlobalModel:
    return state.model if group == SAME else state.alternatives[group]


def _instruct(
    setup: Setup, state: ServerState, round: int, cohort: Sequence[int]
) -> list[Instruction]:
    trial = _trial(state)
    groups = list(trial.rewards)
    # Clients change groups, since they differ in data and speed.
    return [
        _for_group(setup, state, trial, groups[(place + round) % len(groups)], round, client)
        for place, client in enumerate(cohort)
    ]


def _for_group(
    setup: Setup, state: ServerState, trial: Trial, group: str, round: int, client: int
) -> Instruction:
    instruction = full_instruction(
        setup, replace(state, model=_model(state, group)), round, client, None
    )
    # The cached layers are the same in all groups, so that a client that changes groups can still
    # use its cached states.
    frozen = setup.num_layers - trial.depth - (DEEPER in trial.rewards)
    budget = instruction.budget
    if budget.steps is not None:
        budget = replace(budget, steps=_steps(setup, state, group, frozen, client, budget.steps))
    # With one group there is nothing to choose, and no reward to measure.
    reward_rows = REWARD_ROWS if len(trial.rewards) > 1 else 0
    return replace(instruction, frozen=frozen, budget=budget, reward_rows=reward_rows)


def _steps(
    setup: Setup, state: ServerState, group: str, frozen: int, client: int, steps: int
) -> int:
    """Steps of a group that take the modelled time of ``steps`` steps of group ``SAME``; >= 1."""
    clock, training = setup.clock, setup.config.training
    if clock is None or group == SAME:
        return steps
    arithmetic, profile = clock.arithmetic, clock.fleet.profile(client)

    def seconds(model: GlobalModel) -> float:
        layers, rest = arithmetic(model.adapter).training(training.max_length)
        flops = training.batch_size * (sum(layers[frozen:]) + rest)
        return compute_seconds(profile, flops, steps=1)

    return max(1, round(steps * seconds(state.model) / seconds(_model(state, group))))


def _merge(
    setup: Setup, state: ServerState, instructions: Sequence[Instruction], replies: Sequence[Reply]
) -> ServerState:
    """Average each group's model; after the last round of a trial continue with the best one.

    A round without updates does not count.
    """
    if not any(isinstance(reply, Update) for reply in replies):
        return state
    trial = _trial(state)
    sums, counts, models = dict(trial.rewards), dict(trial.counts), {}
    for group in trial.rewards:
        model = _model(state, group)
        of_group = [
            reply
            for instruction, reply in zip(instructions, replies, strict=True)
            if instruction.adapter == model.adapter
        ]
        models[group] = _plain_mean(model, of_group)
        rewards = [r.reward for r in of_group if isinstance(r, Update) and r.reward is not None]
        sums[group] += sum(rewards)
        counts[group] += len(rewards)
    trial = replace(trial, rounds=trial.rounds + 1, rewards=sums, counts=counts)
    if trial.rounds < TRIAL_ROUNDS:
        others = {group: model for group, model in models.items() if group != SAME}
        return ServerState(models[SAME], others, trial)
    depth, width = _shapes(setup, trial.depth, trial.width)[trial.best]
    return _begin_trial(setup, models[trial.best], depth, width)


FEDADAPTER = Method(
    name="fedadapter",
    summary="bottlenecks that grow in depth and width, by trial groups (FedAdapter)",
    tables=frozenset({"frozen"}),
    init=_init,
    instruct=_instruct,
    merge=_merge,
    memory_type=Trial,
    check=_check,
)
