"""Close a round on the modelled clock: which updates are merged, and how long the round takes.

Ours. The decision follows from instructions, updates and the seed, never from the order of arrival.
It is therefore the same on every transport and in a resumed run.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from droppeft.config import Config, TrainingConfig
from droppeft.costs.device_profiles import Fleet
from droppeft.costs.fake_step import FakeModel, count_step
from droppeft.costs.modelled_clock import Arithmetic, Clock, RoundCost
from droppeft.costs.step_counts import StepCounts
from droppeft.costs.stored_counts import stored_counts
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.messages.instruction import AdapterSpec, Instruction
from droppeft.messages.reply import Failure, Reply, Update
from droppeft.models.loading import Backbone

_COUNTED: dict[object, Arithmetic] = {}
"""Counts by everything they depend on, because most runs of a comparison need the same counts."""


class Counting:
    """Counts the arithmetic of each adapter once, when it is first needed.

    Attributes:
        wall_s: seconds that counting took so far.
    """

    def __init__(self, arithmetic: Callable[[AdapterSpec], Arithmetic]) -> None:
        self.wall_s = 0.0
        self._arithmetic = arithmetic
        self._known: dict[AdapterSpec, Arithmetic] = {}

    def __call__(self, spec: AdapterSpec) -> Arithmetic:
        """Return the arithmetic of an adapter."""
        if spec not in self._known:
            start = time.perf_counter()
            self._known[spec] = self._arithmetic(spec)
            self.wall_s += time.perf_counter() - start
        return self._known[spec]


def make_clock(fleet: Fleet, arithmetic: Callable[[AdapterSpec], Arithmetic]) -> Clock:
    """Make the modelled clock of a run."""
    return Clock(fleet, Counting(arithmetic))


def counting_wall_s(clock: Clock | None) -> float:
    """Seconds that this process has spent on counting operations for the modelled clock."""
    arithmetic = clock.arithmetic if clock else None
    return arithmetic.wall_s if isinstance(arithmetic, Counting) else 0.0


def clock_for(config: Config, fleet: Fleet, backbone: Backbone) -> tuple[Clock | None, str | None]:
    """Make the modelled clock of a run, or return ``None`` and the reason why there is none.

    Raises:
        DroppeftError: there is none, and the configuration needs it to close rounds.
    """
    clock = make_clock(fleet, lambda spec: count_rows(backbone, config.task, spec, config.training))
    try:
        clock.arithmetic(adapter_spec(config.adapter, backbone.num_layers, config.frozen.count))
    except DroppeftError as error:
        if config.clock.deadline_s is not None or config.drawn > config.cohort_size:
            raise DroppeftError(
                f"clock.deadline_s and clock.over_selection need a modelled clock: {error}; "
                "remove these settings"
            ) from None
        return None, str(error)
    return clock, None


def count_rows(
    backbone: Backbone, task: str, spec: AdapterSpec, training: TrainingConfig
) -> Arithmetic:
    """Count the FLOPs of rows of any length.

    They are a polynomial of second degree in the length, so three lengths are counted. Precision
    and quantisation change no FLOPs: their effect is part of a profile's effective speed.

    Raises:
        DroppeftError: the model cannot be run on fake tensors.
    """
    config: Any = backbone.model.config
    dropout = training.backbone_dropout
    step = (training.batch_size, training.max_length, training.checkpointing, dropout)
    key = (task, type(config), repr(vars(config)), spec, tuple(backbone.new_modules), step)
    if key not in _COUNTED:
        model = cache(
            lambda: FakeModel(config, task, spec, backbone.new_modules, backbone_dropout=dropout)
        )

        def count(length: int) -> StepCounts:
            checkpointing = training.checkpointing
            return count_step(model(), training.batch_size, length, checkpointing=checkpointing)

        longest = training.max_length
        _COUNTED[key] = Arithmetic(
            tuple(
                stored_counts((key, length), partial(count, length))
                for length in (longest // 4, longest // 2, longest)
            )
        )
    return _COUNTED[key]


def longest_step(config: Config, backbone: Backbone) -> Callable[[AdapterSpec], StepCounts]:
    """Return a function that counts a step of rows of the maximum length, once per adapter."""

    @cache
    def stored(spec: AdapterSpec) -> StepCounts:
        of: Any = backbone.model.config
        key = (type(of), repr(vars(of)), tuple(backbone.new_modules), spec, config.task)
        settings = (config.quantization, config.training)
        return stored_counts((key, settings), partial(count, spec))

    def count(spec: AdapterSpec) -> StepCounts:
        training = config.training
        model = FakeModel(
            backbone.model.config,
            config.task,
            spec,
            backbone.new_modules,
            config.quantization,
            precision=training.precision,
            backbone_dropout=training.backbone_dropout,
        )
        rows = training.rows_at_once
        return count_step(model, rows, training.max_length, training.checkpointing)

    return stored


def close_round(
    clock: Clock | None,
    config: Config,
    instructions: Sequence[Instruction],
    replies: Sequence[Reply],
) -> tuple[list[Reply], RoundCost]:
    """Accept the first ``cohort_size`` updates on the modelled clock that meet the deadline.

    The other updates become failures: those after the deadline are *late*, those that were in time
    but not among the first are *surplus*. Without a clock, all updates are accepted.

    The round lasts until the last accepted update has arrived. If fewer than ``cohort_size``
    updates were accepted and somebody was late, it lasts until the deadline. The server does not
    wait for clients that failed. The energy of all clients that trained is counted, whether their
    updates are merged or not.

    Args:
        instructions: of the round.
        replies: in the order of the instructions, after validation.

    Returns:
        The replies to be merged, in the order of the instructions, and the cost of the round.
    """
    if clock is None:
        return list(replies), RoundCost(
            (None,) * len(instructions), late=(), surplus=(), round_s=None
        )
    deadline_s, cohort_size = config.clock.deadline_s, config.cohort_size
    costs = [
        clock.client_cost(instruction, reply) if isinstance(reply, Update) else None
        for instruction, reply in zip(instructions, replies, strict=True)
    ]
    # (seconds, index) in order of modelled arrival; equal times are ordered by index.
    finished = sorted((cost.total_s, index) for index, cost in enumerate(costs) if cost)
    in_time = [pair for pair in finished if deadline_s is None or pair[0] <= deadline_s]
    merged, surplus, late = in_time[:cohort_size], in_time[cohort_size:], finished[len(in_time) :]
    accepted = list(replies)
    for total_s, index in surplus:
        accepted[index] = Failure(
            instructions[index].client,
            f"surplus: it took {total_s:.1f} modelled s, and {cohort_size} others were faster",
        )
    for total_s, index in late:
        accepted[index] = Failure(
            instructions[index].client,
            f"late: it took {total_s:.1f} modelled s, the deadline is {deadline_s:g} s",
        )
    last_s = merged[-1][0] if merged else 0.0
    return accepted, RoundCost(
        clients=tuple(costs),
        late=tuple(sorted(instructions[index].client for _, index in late)),
        surplus=tuple(sorted(instructions[index].client for _, index in surplus)),
        round_s=deadline_s if deadline_s and late and len(merged) < cohort_size else last_s,
    )
