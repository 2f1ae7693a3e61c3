"""The modelled clock: seconds and joules that a turn would take on a client of a given kind.

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
    Instruction,
    MeasuredCost,
    Update,
    first_trained_layer,
    instruction_bytes,
    payload_bytes,
)


@dataclass(frozen=True)
class ClientCost:
    """A client's turn on the modelled clock.

    Attributes:
        profile: name of the client's kind.
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
    def total_s(self) -> float:
        """From the start of the round to the arrival of the reply."""
        return self.download_s + self.train_s + self.reward_s + self.upload_s


@dataclass(frozen=True)
class RoundCost:
    """A round on the modelled clock.

    Attributes:
        clients: in instruction order; ``None`` for a client from which nothing came that could be
            checked.
        late: clients that missed the deadline.
        surplus: clients that were in time when enough others had been faster.
        round_s: from its start to its close; ``None`` without a clock.
        absent: clients that were drawn and could not be asked.
    """

    clients: tuple[ClientCost | None, ...]
    late: tuple[int, ...]
    surplus: tuple[int, ...]
    round_s: float | None
    absent: tuple[int, ...] = ()

    @property
    def energy_j(self) -> float | None:
        """Of all turns, merged or not; ``None`` without a clock."""
        if self.round_s is None:
            return None
        return sum(turn.energy_j for turn in self.clients if turn)


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
    """What the clients' turns take, for whoever decides by it; a pure function of its arguments.

    Attributes:
        fleet: which client is of which kind.
        arithmetic: of the run's model with an adapter of given shapes.
    """

    fleet: Fleet
    arithmetic: Callable[[AdapterSpec], Arithmetic]

    def client_cost(self, instruction: Instruction, update: Update) -> ClientCost:
        """Cost of the turn that a client says it took; the same on every transport."""
        round, client = instruction.round, instruction.client
        profile = self.fleet.profile(client)
        arithmetic = self.arithmetic(instruction.adapter)
        work = training_flops(
            arithmetic, update.cost, instruction.frozen, first_trained_layer(instruction)
        )
        down = instruction_bytes(instruction) / self.fleet.download_bytes_per_s(round, client)
        up = payload_bytes(update.tensors) / self.fleet.upload_bytes_per_s(round, client)
        work += own_flops(arithmetic, update.cost)
        train = compute_seconds(profile, work, update.steps + update.cost.personal_steps)
        measuring = compute_seconds(profile, reward_flops(arithmetic, update.cost))
        return ClientCost(
            profile=self.fleet.names[client],
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
        cost: what the client says it computed.
        frozen: so many of the first layers run without a backward, for the rows whose states
            were not on the client yet.
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
    if cost.cached_layers.built:
        layers, _ = arithmetic.forward(cost.cached_layers.built_tokens / cost.cached_layers.built)
        total += cost.cached_layers.built * sum(layers[:frozen])
    # The rest may be below 0, by what the lowest layer of a step that runs any is spared.
    return max(0.0, total)


def own_flops(arithmetic: Arithmetic, cost: MeasuredCost) -> float:
    """FLOPs of training an adapter of a client's own: all layers, rows as long as in the turn."""
    row_length = cost.tokens / cost.rows
    layers, rest = arithmetic.training(row_length)
    return cost.personal_tokens / row_length * (sum(layers) + rest)


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
