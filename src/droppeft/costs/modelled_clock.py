"""The modelled clock: seconds and joules of a local training on a given device profile.

Ours. The time is FLOPs over effective speed, a fixed overhead per step, and bytes over bandwidth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from droppeft.config import DeviceProfile
from droppeft.costs.device_profiles import Fleet
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.messages.encoding import tensor_bytes
from droppeft.messages.instruction import (
    AdapterSpec,
    Instruction,
    instruction_bytes,
)
from droppeft.messages.reply import MeasuredCost, Update


@dataclass(frozen=True)
class ClientCost:
    """A client's local training on the modelled clock.

    Attributes:
        profile: name of the client's device profile.
        download_s, train_s, reward_s, upload_s: one after another; ``reward_s`` is the time for
            measuring the reward and scoring the layers, 0 if neither was asked for.
        energy_j: of all of these; waiting for other clients is not counted.
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
        clients: in the order of the instructions; ``None`` for a client without a valid reply.
        late: clients that missed the deadline.
        surplus: clients that were in time but not needed, since enough others were faster.
        round_s: from its start to its end; ``None`` without a clock.
        absent: clients that were drawn but not available.
    """

    clients: tuple[ClientCost | None, ...]
    late: tuple[int, ...]
    surplus: tuple[int, ...]
    round_s: float | None
    absent: tuple[int, ...] = ()

    @property
    def energy_j(self) -> float | None:
        """Energy of all clients, merged or not; ``None`` without a clock."""
        if self.round_s is None:
            return None
        return sum(cost.energy_j for cost in self.clients if cost)


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of a model with an adapter, for rows of any length.

    A row's FLOPs are a quadratic polynomial of its length (attention is quadratic, the head
    constant), which three counts determine. All rows of a local training are treated as having
    their mean length. This neglects the quadratic term times the variance of the lengths: 1 % in
    BERT-base with rows of 128 ± 64 tokens.

    Attributes:
        counts: at as many lengths as the polynomial needs, each at any batch size.
    """

    counts: tuple[StepCounts, ...]

    def training(self, row_length: float) -> tuple[tuple[float, ...], float]:
        """FLOPs of a row, forward and backward: of each of the L layers, and of the rest."""
        return self._per_row(row_length, lambda part: part.flops)

    def forward(self, row_length: float) -> tuple[tuple[float, ...], float]:
        """FLOPs of a row, forward only: of each of the L layers, and of the rest."""
        return self._per_row(row_length, lambda part: part.forward_flops)

    def _per_row(
        self, length: float, pick: Callable[[BlockCounts], int]
    ) -> tuple[tuple[float, ...], float]:
        weights = _lagrange([count.length for count in self.counts], length)
        shares = [weight / count.batch for weight, count in zip(weights, self.counts, strict=True)]
        parts = [[pick(part) for part in (*count.blocks, count.rest)] for count in self.counts]
        *layers, rest = (_dot(shares, part) for part in zip(*parts, strict=True))
        return tuple(layers), rest


def _lagrange(points: Sequence[int], at: float) -> list[float]:
    """Weights of Lagrange's interpolation: of a polynomial's values at the points, for another."""
    return [
        math.prod((at - other) / (point - other) for other in points if other != point)
        for point in points
    ]


@dataclass(frozen=True)
class Clock:
    """Computes modelled costs of clients.

    Attributes:
        fleet: the clients' device profiles.
        arithmetic: gives the FLOPs of the run's model with an adapter.
    """

    fleet: Fleet
    arithmetic: Callable[[AdapterSpec], Arithmetic]

    def client_cost(self, instruction: Instruction, update: Update) -> ClientCost:
        """Cost of a local training, from what the client reports; the same on every transport."""
        round, client = instruction.round, instruction.client
        profile = self.fleet.profile(client)
        arithmetic = self.arithmetic(instruction.adapter)
        work = training_flops(arithmetic, update.cost, instruction.frozen)
        down = instruction_bytes(instruction) / self.fleet.download_bytes_per_s(round, client)
        sent = tensor_bytes(update.tensors, instruction.encoding)
        up = sent / self.fleet.upload_bytes_per_s(round, client)
        work += personal_adapter_flops(arithmetic, update.cost)
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


def training_flops(arithmetic: Arithmetic, cost: MeasuredCost, frozen: int = 0) -> float:
    """FLOPs of a local training: each layer counts for the tokens that it computed.

    Args:
        arithmetic: of the model with the adapter.
        cost: what the client reports to have computed.
        frozen: number of first layers without an adapter. Where they are cached, they ran forward
            for the rows whose hidden states were not stored on the client yet.
    """
    row_length = cost.tokens / cost.rows
    layers, rest = arithmetic.training(row_length)
    forward, _ = arithmetic.forward(row_length)
    total = _dot(cost.layer_tokens, layers) / row_length
    total += _dot(cost.forward_tokens, forward) / row_length + cost.rows * rest
    if cost.cached_layers.built:
        layers, _ = arithmetic.forward(cost.cached_layers.built_tokens / cost.cached_layers.built)
        total += cost.cached_layers.built * sum(layers[:frozen])
    # The rest may be negative, since what the lowest active layer saves is subtracted there.
    return max(0.0, total)


def personal_adapter_flops(arithmetic: Arithmetic, cost: MeasuredCost) -> float:
    """FLOPs of training a personal adapter: all layers, with the rows' mean length."""
    row_length = cost.tokens / cost.rows
    layers, rest = arithmetic.training(row_length)
    return cost.personal_tokens / row_length * (sum(layers) + rest)


def reward_flops(arithmetic: Arithmetic, cost: MeasuredCost) -> float:
    """FLOPs of measuring the reward and scoring layers: forwards through all layers."""
    row_length = cost.tokens / cost.rows
    layers, rest = arithmetic.forward(row_length)
    tokens = cost.reward_tokens + cost.scoring_tokens
    return tokens / row_length * (sum(layers) + rest)


def compute_seconds(profile: DeviceProfile, flops: float, steps: int = 0) -> float:
    """Seconds that a device takes for some FLOPs and optimizer steps."""
    return flops / profile.effective_flops_per_s + steps * profile.step_overhead_s


def energy_joules(profile: DeviceProfile, *, computing_s: float, waiting_s: float) -> float:
    """Joules of a local training: full power while computing, idle power while transferring."""
    return profile.train_watts * computing_s + profile.idle_watts * waiting_s


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
