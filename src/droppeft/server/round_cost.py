"""When a round closes on the modelled clock: who is there, who is merged, and how long it takes.

Ours. All of it follows from instructions, Updates and the seed, never from the order of arrival,
so that every transport and a resumed run decide alike.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from droppeft.config import Config, TrainingConfig
from droppeft.costs.device_profiles import Fleet
from droppeft.costs.fake_step import FakeModel, count_step
from droppeft.costs.modelled_clock import Arithmetic, Clock, RoundCost
from droppeft.costs.step_counts import StepCounts
from droppeft.errors import DroppeftError
from droppeft.federated_method import adapter_spec
from droppeft.messages import AdapterSpec, Failure, Instruction, Reply, Update
from droppeft.models.loading import Backbone

_COUNTED: dict[object, Arithmetic] = {}
"""By all that it follows from: the runs of a comparison mostly count the same."""


class Counting:
    """Counts an adapter's arithmetic once, when it is first needed, and notes how long it took."""

    def __init__(self, arithmetic: Callable[[AdapterSpec], Arithmetic]) -> None:
        self.wall_s = 0.0
        self._arithmetic = arithmetic
        self._known: dict[AdapterSpec, Arithmetic] = {}

    def __call__(self, spec: AdapterSpec) -> Arithmetic:
        """The same as the function's."""
        if spec not in self._known:
            start = time.perf_counter()
            self._known[spec] = self._arithmetic(spec)
            self.wall_s += time.perf_counter() - start
        return self._known[spec]


def make_clock(fleet: Fleet, arithmetic: Callable[[AdapterSpec], Arithmetic]) -> Clock:
    """The clock of a run."""
    return Clock(fleet, Counting(arithmetic))


def counting_wall_s(clock: Clock | None) -> float:
    """Seconds that this process spent on counting for a clock: no work of a server's."""
    arithmetic = clock.arithmetic if clock else None
    return arithmetic.wall_s if isinstance(arithmetic, Counting) else 0.0


def clock_for(config: Config, fleet: Fleet, backbone: Backbone) -> tuple[Clock | None, str | None]:
    """The clock of a run, or ``None`` and why there cannot be one.

    Raises:
        DroppeftError: there is none and the configuration has rounds close by it.
    """
    clock = make_clock(fleet, lambda spec: count_rows(backbone, spec, config.training))
    try:
        clock.arithmetic(adapter_spec(config.adapter, backbone.num_layers, config.frozen.count))
    except DroppeftError as error:
        if config.clock.deadline_s is not None or config.drawn > config.cohort_size:
            raise DroppeftError(
                f"clock.deadline_s and clock.over_selection cannot be kept: {error}; leave them out"
            ) from None
        return None, str(error)
    return clock, None


def count_rows(backbone: Backbone, spec: AdapterSpec, training: TrainingConfig) -> Arithmetic:
    """Count what rows of any length cost: a polynomial of second degree has three places.

    Precision and quantisation change no FLOPs; what they save is in a profile's effective speed.

    Raises:
        DroppeftError: the model cannot be run without values.
    """
    model: Any = backbone.model.config
    step = (training.batch_size, training.max_length, training.checkpointing)
    of = (type(model), repr(vars(model)), spec, tuple(backbone.new_modules), step)
    if of not in _COUNTED:
        paper = FakeModel(model, spec, backbone.new_modules)
        _COUNTED[of] = _counted(paper, training)
    return _COUNTED[of]


def _counted(paper: FakeModel, training: TrainingConfig) -> Arithmetic:
    longest = training.max_length
    return Arithmetic(
        tuple(
            count_step(paper, training.batch_size, length, checkpointing=training.checkpointing)
            for length in (longest // 4, longest // 2, longest)
        )
    )


def longest_step(config: Config, backbone: Backbone) -> Callable[[AdapterSpec], StepCounts]:
    """Counts the step of a run whose rows are all as long as can be; each adapter's once."""

    @cache
    def count(spec: AdapterSpec) -> StepCounts:
        training = config.training
        paper = FakeModel(backbone.model.config, spec, backbone.new_modules, config.quantization)
        return count_step(
            paper,
            training.batch_size,
            training.max_length,
            training.precision,
            training.checkpointing,
        )

    return count


def close_round(
    clock: Clock | None,
    config: Config,
    instructions: Sequence[Instruction],
    answers: Sequence[Reply],
) -> tuple[list[Reply], RoundCost]:
    """Keep the first ``cohort`` Updates by modelled time that are not late; the rest fail.

    Without a clock all are kept.

    The round lasts until the last of those has arrived; until the deadline if it closed with fewer
    and somebody was late. Nobody waits for a client that fails. Whoever trained has spent the
    energy, merged or not.

    Args:
        plans: of the round.
        answers: in their order, refused ones replaced by their Failure.

    Returns:
        What is merged, in instruction order, and what it cost.
    """
    if clock is None:
        return list(answers), RoundCost(
            (None,) * len(instructions), late=(), surplus=(), round_s=None
        )
    deadline_s, cohort = config.clock.deadline_s, config.cohort_size
    turns = [
        clock.client_cost(instruction, answer) if isinstance(answer, Update) else None
        for instruction, answer in zip(instructions, answers, strict=True)
    ]
    # Equal times are told apart by their place among the instructions.
    finished = sorted((turn.total_s, place) for place, turn in enumerate(turns) if turn)
    in_time = [pair for pair in finished if deadline_s is None or pair[0] <= deadline_s]
    merged, surplus, late = in_time[:cohort], in_time[cohort:], finished[len(in_time) :]
    replies = list(answers)
    for total_s, place in surplus:
        replies[place] = Failure(
            instructions[place].client,
            f"surplus: {cohort} others were done in {total_s:.1f} modelled s",
        )
    for total_s, place in late:
        replies[place] = Failure(
            instructions[place].client,
            f"late: {total_s:.1f} modelled s, the deadline is {deadline_s:g} s",
        )
    last_s = merged[-1][0] if merged else 0.0
    return replies, RoundCost(
        clients=tuple(turns),
        late=tuple(sorted(instructions[place].client for _, place in late)),
        surplus=tuple(sorted(instructions[place].client for _, place in surplus)),
        round_s=deadline_s if deadline_s and late and len(merged) < cohort else last_s,
    )
