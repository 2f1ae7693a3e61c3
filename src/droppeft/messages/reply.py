"""What a client replies to an instruction. Ours."""

from collections.abc import Mapping
from dataclasses import dataclass

from droppeft.messages.tensors import Tensors
from droppeft.refusals import FOR_GOOD, STATE_LOST, Refused


@dataclass(frozen=True)
class CachedLayersCost:
    """Cost of the frozen layers in one local training; all 0 without frozen layers.

    Attributes:
        hits: rows whose hidden states were already on the client's disk.
        built: rows whose hidden states were computed to be stored; 0 without a cache.
        built_tokens: tokens of the ``built`` rows, padding included.
        build_wall_s: seconds for computing and storing the states; part of the time of the
            training steps.
        stored_bytes: bytes of states on the client's disk after the local training.
    """

    hits: int = 0
    built: int = 0
    built_tokens: int = 0
    build_wall_s: float = 0.0
    stored_bytes: int = 0


@dataclass(frozen=True)
class MeasuredCost:
    """Measured cost of one local training on the machine that ran it; times in seconds.

    Attributes:
        total_wall_s: the whole local training, loading and packing included.
        train_wall_s: the training steps alone.
        reward_wall_s: measuring the reward; 0 if it was not asked for.
        activation_bytes_peak: most bytes stored for the backward pass in any step. Each storage
            counts once, parameters do not count.
        tokens: tokens trained on, padding and skipped steps included.
        rows: rows that contain these tokens.
        layer_tokens: per layer, how many of these tokens it was trained on.
        forward_tokens: per layer, how many of these tokens it computed forward only; also of frozen
            layers whose states are not cached.
        reward_tokens: tokens that all layers computed to measure the reward, padding included.
        cached_layers: cost of the frozen layers.
        scoring_tokens: tokens that all layers computed to score layers, padding included.
        scoring_wall_s: scoring the layers, beyond what is collected while training.
        personal_steps, personal_tokens, personal_wall_s: training the personal adapter.
    """

    total_wall_s: float
    train_wall_s: float
    reward_wall_s: float
    activation_bytes_peak: int
    tokens: int
    rows: int
    layer_tokens: tuple[int, ...]
    forward_tokens: tuple[int, ...]
    reward_tokens: int
    cached_layers: CachedLayersCost = CachedLayersCost()
    scoring_tokens: int = 0
    scoring_wall_s: float = 0.0
    personal_steps: int = 0
    personal_tokens: int = 0
    personal_wall_s: float = 0.0


@dataclass(frozen=True)
class Update:
    """A client's reply after local training.

    Attributes:
        round, client, nonce: copied from the instruction.
        tensors: trained values by layer, as far as the instruction lets them be sent and the
            client shares them. Layers that no step trained are left out, as they did not change.
        examples: rows trained on, repetitions counted.
        targets: predictions trained on: the same rows, or the tokens of completions. It is the
            update's weight in a mean.
        steps: optimizer steps taken.
        active_steps: per layer, the number of steps in which it was trained.
        importance: per layer, the gradient norm of its adapter, mean over its active steps; 0 for
            a layer that no step trained.
        train_loss: mean loss over the steps.
        reward: decrease of the loss on the client's validation rows; ``None`` if not asked for.
        cost: measured cost.
        shared: the layers that the client shares from now on, in order: those that it chose, and
            those that did not change and were shared before. ``None`` without a sharing rule.
        scores: one score per layer by the rule's criterion, 0 where there was no choice; ``None``
            without a sharing rule.
    """

    round: int
    client: int
    nonce: str
    tensors: Tensors
    examples: int
    targets: int
    steps: int
    active_steps: tuple[int, ...]
    importance: tuple[float, ...]
    train_loss: float
    reward: float | None
    cost: MeasuredCost
    shared: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class EvaluationReply:
    """Quality of a client's model on the client's test rows, or on some of its validation rows.

    Attributes:
        round, client, nonce: copied from the instruction.
        rows: number of these rows.
        metrics: the value of each of the task's metrics on these rows and, if there are texts, of
            each metric of generated texts.
        texts: number of generated texts. The texts themselves stay on the client.
    """

    round: int
    client: int
    nonce: str
    rows: int
    metrics: Mapping[str, float]
    texts: int = 0


@dataclass(frozen=True)
class Failure:
    """Stands for the reply of a client that sent nothing to merge.

    Either the client did not reply, or it could not run the instruction, or the server refused
    its reply.

    Attributes:
        client: number of the client.
        reason: the reason, in one sentence.
        lost: whether the client no longer has its saved state. The next instruction must then
            bring all tensors.
        for_good: whether the client would refuse the same measurement in every round.
    """

    client: int
    reason: str
    lost: bool = False
    for_good: bool = False

    @classmethod
    def of(cls, client: int, refused: Refused) -> "Failure":
        """Return the failure of a client that refused its instruction."""
        lost, for_good = refused.code == STATE_LOST, refused.code in FOR_GOOD
        return cls(client, str(refused), lost=lost, for_good=for_good)


Answer = Update | EvaluationReply
"""What a client sends if it has run its instruction."""


Reply = Answer | Failure
"""What the server receives for an instruction."""
