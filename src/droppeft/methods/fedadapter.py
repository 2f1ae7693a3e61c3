"""FedAdapter: bottleneck adapters that grow, in depth from the output and in width, while training.

Source: arXiv:2205.10162. The cohort is split into trial groups: one keeps the present depth and
width, one has adapters in one layer more, one is 8 wider; groups get equal time, after a trial the
best one's model continues, and what the layers below all adapters make of a text is kept on the
client. Ours where the paper is silent: the first depth and width; trials of 3 rounds; clients
change groups from round to round; equal time is modelled time, by the number of steps; the best
group is the one whose clients' loss on their validation rows fell most per turn; a new layer and
new widths start as fresh adapters, which change nothing until they are trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from droppeft.config import Config
from droppeft.costs.modelled_clock import compute_seconds
from droppeft.errors import DroppeftError
from droppeft.federated_method import (
    Method,
    Setup,
    adapter_spec,
    full_instruction,
    start_with,
)
from droppeft.messages import (
    AdapterSpec,
    Array,
    GlobalModel,
    Instruction,
    Reply,
    ServerState,
    Tensors,
    Update,
)
from droppeft.sharing.aggregation import average_over_holders, by_examples

FIRST_DEPTH, FIRST_WIDTH, WIDER_BY, MOST_DEPTH = 2, 8, 8, 12
TRIAL_ROUNDS, REWARD_ROWS = 3, 32
SAME, DEEPER, WIDER = "same", "deeper", "wider"


@dataclass(frozen=True)
class Trial:
    """Where the search stands; the content of the state's memory.

    Attributes:
        depth, width: of the model that all groups began from.
        rounds: of this trial that are over.
        rewards: per group, the sum of its clients' rewards.
        turns: per group, how many rewards that are.
    """

    depth: int
    width: int
    rounds: int
    rewards: Mapping[str, float]
    turns: Mapping[str, int]

    @property
    def best(self) -> str:
        """The group with the largest mean reward; of equal ones the one that grows less."""
        means = {
            group: self.rewards[group] / turns for group, turns in self.turns.items() if turns > 0
        }
        return max(means, key=lambda group: means[group], default=SAME)


def check_bottlenecks(config: Config) -> None:
    """Refuse what a method that grows bottlenecks cannot have.

    Raises:
        DroppeftError: another type of adapter, or frozen layers.
    """
    chosen, method = config.adapter, config.method
    if chosen.type != "bottleneck":
        raise DroppeftError(
            f"method={method} grows bottlenecks, and adapter.type={chosen.type}; "
            "set adapter.type=bottleneck"
        )
    if config.frozen.layers:
        raise DroppeftError(
            f"method={method} freezes the layers below its adapters by itself; leave "
            f"frozen.layers={config.frozen.layers} out"
        )


def first_shape(setup: Setup) -> tuple[int, int]:
    """Depth and width with which growing begins."""
    width = setup.config.adapter.width or FIRST_WIDTH
    return min(FIRST_DEPTH, setup.num_layers), min(FIRST_WIDTH, width)


def largest_shape(setup: Setup) -> tuple[int, int]:
    """Depth and width with which it ends."""
    return min(MOST_DEPTH, setup.num_layers), setup.config.adapter.width or FIRST_WIDTH


def plain_mean(model: GlobalModel, replies: Sequence[Reply]) -> GlobalModel:
    """The model with its holders' means, weighted by rows."""
    updates = [reply for reply in replies if isinstance(reply, Update)]
    return replace(model, tensors=average_over_holders(model.tensors, updates, by_examples))


def _check(config: Config) -> None:
    check_bottlenecks(config)
    if config.training.local_epochs is not None:
        raise DroppeftError(
            "method=fedadapter gives its groups equal time by their steps; set "
            "training.local_steps instead of training.local_epochs"
        )
    if config.cohort_size < 3:
        raise DroppeftError(
            "method=fedadapter splits the cohort into three groups, and "
            f"cohort_size={config.cohort_size}; set it to 3 or more"
        )


def _init(setup: Setup) -> ServerState:
    depth, width = first_shape(setup)
    return _begin_trial(setup, start_with(setup, spec_of(setup, depth, width)).model, depth, width)


def spec_of(setup: Setup, depth: int, width: int) -> AdapterSpec:
    """Bottlenecks of a width in the last ``depth`` layers."""
    chosen = setup.config.adapter.model_copy(update={"width": width})
    return adapter_spec(chosen, setup.num_layers, setup.num_layers - depth)


def _shapes(setup: Setup, depth: int, width: int) -> dict[str, tuple[int, int]]:
    """Depth and width of every group's adapters; no group for what has grown to its cap."""
    shapes = {SAME: (depth, width)}
    deepest, widest = largest_shape(setup)
    if depth < deepest:
        shapes[DEEPER] = (depth + 1, width)
    if width < widest:
        shapes[WIDER] = (depth, min(width + WIDER_BY, widest))
    return shapes


def _begin_trial(setup: Setup, model: GlobalModel, depth: int, width: int) -> ServerState:
    """All groups begin with the same function: what is new in a model changes nothing yet."""
    groups = _shapes(setup, depth, width)
    larger = {
        group: grown(setup, model, spec_of(setup, *shape))
        for group, shape in groups.items()
        if group != SAME
    }
    trial = Trial(depth, width, 0, dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0))
    return ServerState(model, larger, trial)


def grown(setup: Setup, model: GlobalModel, spec: AdapterSpec) -> GlobalModel:
    """A larger adapter with the smaller one's values where it has them, fresh ones elsewhere."""
    fresh = setup.fresh_tensors(spec)
    tensors: Tensors = {
        key: {
            name: _put_into(value, model.tensors.get(key, {}).get(name))
            for name, value in named.items()
        }
        for key, named in fresh.items()
    }
    return GlobalModel(spec, tensors, model.base_delta)


def _put_into(larger: Array, smaller: Array | None) -> Array:
    if smaller is None:
        return larger
    made = np.array(larger)
    made[tuple(slice(size) for size in smaller.shape)] = smaller
    return made


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
    # Nobody stays in a group for good: clients differ in data and speed.
    return [
        _of_group(setup, state, trial, groups[(place + round) % len(groups)], round, client)
        for place, client in enumerate(cohort)
    ]


def _of_group(
    setup: Setup, state: ServerState, trial: Trial, group: str, round: int, client: int
) -> Instruction:
    instruction = full_instruction(
        setup, replace(state, model=_model(state, group)), round, client, None
    )
    # The same layers are kept for all groups, so that a client's states outlive a change of groups.
    frozen = setup.num_layers - trial.depth - (DEEPER in trial.rewards)
    budget = instruction.budget
    if budget.steps is not None:
        budget = replace(budget, steps=_steps(setup, state, group, frozen, client, budget.steps))
    rewards = REWARD_ROWS if len(trial.rewards) > 1 else 0  # there is nothing left to choose
    return replace(instruction, frozen=frozen, budget=budget, reward_rows=rewards)


def _steps(
    setup: Setup, state: ServerState, group: str, frozen: int, client: int, steps: int
) -> int:
    """As many as take the modelled time of so many with the present adapter; 1 at least."""
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
    """Average each group's model; after the last round of a trial go on with the best one.

    A round in which nobody answered is none of the trial.
    """
    if not any(isinstance(reply, Update) for reply in replies):
        return state
    trial = _trial(state)
    sums, turns, models = dict(trial.rewards), dict(trial.turns), {}
    for group in trial.rewards:
        model = _model(state, group)
        own = [
            reply
            for instruction, reply in zip(instructions, replies, strict=True)
            if instruction.adapter == model.adapter
        ]
        models[group] = plain_mean(model, own)
        rewards = [r.reward for r in own if isinstance(r, Update) and r.reward is not None]
        sums[group] += sum(rewards)
        turns[group] += len(rewards)
    now = replace(trial, rounds=trial.rounds + 1, rewards=sums, turns=turns)
    if now.rounds < TRIAL_ROUNDS:
        others = {group: model for group, model in models.items() if group != SAME}
        return ServerState(models[SAME], others, now)
    depth, width = _shapes(setup, now.depth, now.width)[now.best]
    return _begin_trial(setup, models[now.best], depth, width)


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
