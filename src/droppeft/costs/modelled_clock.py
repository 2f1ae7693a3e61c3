"""The modelled clock: seconds and joules that a turn would take on a device of a given kind.

Ours. Time is arithmetic over effective speed, a fixed overhead per step, and bytes over bandwidth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from droppeft.config import DeviceProfile
from droppeft.costs.device_profiles import Fleet
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.errors import DroppeftError
from droppeft.messages import (
    AdapterSpec,
    MeasuredCost,
    Plan,
    Update,
    first_trained_layer,
    payload_bytes,
    plan_bytes,
)


@dataclass(frozen=True)
class TurnCost:
    """A device's turn on the modelled clock.

    Attributes:
        profile: name of the device's kind.
        download_s, train_s, reward_s, upload_s: one after another; ``reward_s`` is what measuring
            the reward and scoring the layers take, 0 if neither was asked for.
        energy_j: of the turn; waiting for others is not counted.
    """

    profile: str
    download_s: float
    train_s: float
    reward_s: float
    upload_s: float
    energy_j: float

    @property
    def turn_s(self) -> float:
        """From the start of the round to the arrival of the reply."""
        return self.download_s + self.train_s + self.reward_s + self.upload_s


@dataclass(frozen=True)
class RoundCost:
    """A round on the modelled clock.

    Attributes:
        turns: in Plan order; ``None`` for a device from which nothing came that could be checked.
        late: devices that missed the deadline.
        surplus: devices that were in time when enough others had been faster.
        round_s: from its start to its close; ``None`` without a clock.
        absent: devices that were drawn and could not be asked.
    """

    turns: tuple[TurnCost | None, ...]
    late: tuple[int, ...]
    surplus: tuple[int, ...]
    round_s: float | None
    absent: tuple[int, ...] = ()

    @property
    def energy_j(self) -> float | None:
        """Of all turns, merged or not; ``None`` without a clock."""
        if self.round_s is None:
            return None
        return sum(turn.energy_j for turn in self.turns if turn)


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of a model with an adapter at any length of its rows.

    A row's FLOPs are a polynomial of second degree in its length (attention is quadratic, the head
    constant), so that three counts say it all. A turn is taken as if all its rows had their mean
    length: what it leaves out is the quadratic part times the variance of the lengths, in BERT-base
    for rows of 128 ± 64 tokens 1 %.

    Attributes:
        counts: at as many lengths as the polynomial needs, each at any batch.
    """

    counts: tuple[StepCounts, ...]

    def training(self, row_length: float) -> tuple[tuple[float, ...], float]:
        """Forward and backward FLOPs of a row: of each of the L layers, and of the rest."""
        return self._per_row(row_length, lambda part: part.flops)

    def forward(self, row_length: float) -> tuple[tuple[float, ...], float]:
        """The forward FLOPs alone."""
        return self._per_row(row_length, lambda part: part.forward_flops)

    def _per_row(
        self, length: float, pick: Callable[[BlockCounts], int]
    ) -> tuple[tuple[float, ...], float]:
        weights = _lagrange([count.length for count in self.counts], length)
        shares = [weight / count.batch for weight, count in zip(weights, self.counts, strict=True)]
        parts = [[pick(part) for part in (*count.blocks, count.rest)] for count in self.counts]
        *layers, rest = (_dot(shares, part) for part in zip(*parts, strict=True))
        return tuple(layers), rest


def _lagrange(places: Sequence[int], place: float) -> list[float]:
    """Weights with which values at some places give the polynomial's value at another."""
    return [
        math.prod((place - other) / (own - other) for other in places if other != own)
        for own in places
    ]


@dataclass(frozen=True)
class Clock:
    """What the devices' turns take, for whoever decides by it; a pure function of its arguments.

    Attributes:
        fleet: which device is of which kind.
        arithmetic: of the run's model with an adapter of given shapes.
    """

    fleet: Fleet
    arithmetic: Callable[[AdapterSpec], Arithmetic]

    def turn_cost(self, plan: Plan, update: Update) -> TurnCost:
        """Cost of the turn that a device says it took; the same on every transport."""
        round, device = plan.round, plan.device
        profile = self.fleet.profile(device)
        arithmetic = self.arithmetic(plan.adapter)
        work = training_flops(arithmetic, update.cost, plan.frozen, first_trained_layer(plan))
        down = plan_bytes(plan) / self.fleet.download_bytes_per_s(round, device)
        up = payload_bytes(update.tensors) / self.fleet.upload_bytes_per_s(round, device)
        work += own_flops(arithmetic, update.cost)
        train = compute_seconds(profile, work, update.steps + update.cost.own_steps)
        measuring = compute_seconds(profile, reward_flops(arithmetic, update.cost))
        return TurnCost(
            profile=self.fleet.names[device],
            download_s=down,
            train_s=train,
            reward_s=measuring,
            upload_s=up,
            energy_j=energy_joules(profile, computing_s=train + measuring, waiting_s=down + up),
        )


def training_flops(
    arithmetic: Arithmetic, cost: MeasuredCost, frozen: int = 0, untrained: int = 0
) -> float:
    """FLOPs of a turn's training: each layer counts for the tokens that it computed.

    Args:
        cost: what the device says it computed.
        frozen: so many of the first layers run without a backward, for the rows whose states
            were not on the device yet.
        untrained: so many of the first layers run without a backward in every step, as far as they
            are not frozen.
    """
    row_length = cost.tokens / cost.rows
    layers, rest = arithmetic.training(row_length)
    forward, _ = arithmetic.forward(row_length)
    rows = [tokens / row_length for tokens in cost.layer_tokens]
    lower = max(frozen, untrained)
    total = _dot(rows[frozen:lower], forward[frozen:lower])
    total += _dot(rows[lower:], layers[lower:]) + cost.rows * rest
    if cost.prefix.built:
        layers, _ = arithmetic.forward(cost.prefix.built_tokens / cost.prefix.built)
        total += cost.prefix.built * sum(layers[:frozen])
    # The rest may be below 0, by what the lowest layer of a step that runs any is spared.
    return max(0.0, total)


def own_flops(arithmetic: Arithmetic, cost: MeasuredCost) -> float:
    """FLOPs of training an adapter of a device's own: all layers, rows as long as in the turn."""
    row_length = cost.tokens / cost.rows
    layers, rest = arithmetic.training(row_length)
    return cost.own_tokens / row_length * (sum(layers) + rest)


def reward_flops(arithmetic: Arithmetic, cost: MeasuredCost) -> float:
    """FLOPs of measuring reward and scores: forwards through all layers, rows as in training."""
    row_length = cost.tokens / cost.rows
    layers, rest = arithmetic.forward(row_length)
    tokens = cost.reward_tokens + cost.scoring_tokens
    return tokens / row_length * (sum(layers) + rest)


def compute_seconds(profile: DeviceProfile, flops: float, steps: int = 0) -> float:
    """Seconds for some FLOPs, of so many optimizer steps."""
    return flops / profile.effective_flops_per_s + steps * profile.step_overhead_s


def energy_joules(profile: DeviceProfile, *, computing_s: float, waiting_s: float) -> float:
    """Joules of a turn: full power while it computes, idle power while it loads and sends."""
    return profile.train_watts * computing_s + profile.idle_watts * waiting_s


def calibrated(flops: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Effective FLOP/s and overhead per step (s) that fit measured step times best.

    Least squares of the relative errors, with an overhead that is not negative.

    Args:
        flops: of each step, at least two that differ.
        seconds: what each took.

    Raises:
        DroppeftError: the times do not grow with the work.
    """
    # The relative errors are overhead * ones + x / speed - 1, with ones = 1/y and x = flops/y.
    ones = [1 / each for each in seconds]
    work = [each / took for each, took in zip(flops, seconds, strict=True)]
    mixed, square = _dot(ones, work), _dot(work, work)
    spread = _dot(ones, ones) * square - mixed**2
    overhead = max(0.0, (sum(ones) * square - sum(work) * mixed) / spread) if spread else 0.0
    inverse = (sum(work) - overhead * mixed) / square
    if not inverse > 0:
        raise DroppeftError("step times that do not grow with the work give no effective speed")
    return 1 / inverse, overhead


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
