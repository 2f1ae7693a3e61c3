"""The two messages of a round: the server's instruction for one client, and the client's Update.

Both are frozen values of numbers and numpy arrays: nothing here needs torch or a transport. How
every method of the comparison is written with them is shown in ``docs/architecture.md``.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from droppeft.errors import DroppeftError

_RUN = re.compile(r"[0-9a-f]{1,64}")

Array = npt.NDArray[np.generic]

LayerKey = int | str
"""Where a trainable tensor belongs: a layer index (0 is nearest the input), ``"head"`` (the task
head) or ``"other"`` (trainable, but in no layer, as a soft prompt)."""

HEAD: LayerKey = "head"
OTHER: LayerKey = "other"

Tensors = Mapping[LayerKey, Mapping[str, Array]]
"""Trainable tensors by layer, then by parameter name."""


Layout = Mapping[str, tuple[LayerKey, tuple[int, ...]]]
"""The trainable tensors that an adapter has: name to (layer, shape)."""


OptionValue = bool | int | float | str | tuple[str, ...]


@dataclass(frozen=True)
class LayerAdapter:
    """What is attached to one layer.

    Attributes:
        type: a name of ``droppeft.adapters.types.TYPES``, ``"lora"``.
        rank: r; ``None`` for the type's own default, and for types without one.
        width: of a bottleneck, ``None`` for other types.
    """

    type: str
    rank: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter of every layer, and what they have in common.

    A setting that is ``None`` has the type's own default, or the type does not have it.

    Attributes:
        layers: one entry per layer, ``None`` where the layer has no adapter. A prompt is in no
            layer: its type stands in every entry.
        alpha: LoRA's scaling numerator; a layer's update counts alpha / rank.
        dropout: dropout probability on the adapter's input.
        targets: module names, or ``("default",)`` or ``("all-linear",)``.
        tokens: virtual tokens of a cached or prompt.
        options: further settings of the PEFT type, by the names of its own configuration class.
    """

    layers: tuple[LayerAdapter | None, ...]
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] = ("default",)
    tokens: int | None = None
    options: tuple[tuple[str, OptionValue], ...] = ()


@dataclass(frozen=True)
class LayerDropout:
    """Gates of one turn.

    Attributes:
        rates: probability of being dropped, one per layer, each in [0, 1].
        sampling: ``"exact"`` (the same count every step) or ``"bernoulli"``.
        every: for how many steps a draw holds; ``None`` for the whole turn.
    """

    rates: tuple[float, ...]
    sampling: Literal["exact", "bernoulli"]
    every: int | None = 1


@dataclass(frozen=True)
class RankPenalty:
    """What makes the last ranks of LoRA small (HetLoRA, arXiv:2401.06432).

    Attributes:
        weight: of the sum over LoRA's pairs of ‖B[:, kept:]‖·‖A[kept:]‖ (Frobenius).
        kept: ranks that are spared.
    """

    weight: float
    kept: int


@dataclass(frozen=True)
class Objective:
    """The loss a client minimises: the task's, plus what a method adds.

    Attributes:
        proximal: weight mu of (mu/2)·‖w − w_received‖² over the trainable tensors (FedProx,
            arXiv:1812.06127); 0 adds nothing and costs nothing.
        rank_penalty: on LoRA's last ranks, or ``None``.
    """

    proximal: float = 0.0
    rank_penalty: RankPenalty | None = None


TASK_ALONE = Objective()
"""Nothing is added to the task's loss."""


@dataclass(frozen=True)
class BaseDelta:
    """A change of the frozen backbone, in force for one client's turn only.

    Attributes:
        version: names the content; part of the key of anything cached from the backbone.
        tensors: what is added, by the backbone's own parameter name; to a linear map (out, in).
    """

    version: str
    tensors: Mapping[str, Array]


@dataclass(frozen=True)
class SharingRule:
    """How a client chooses, after its training, the layers that it shares (METHOD 4).

    The choice is among the layers that the turn trained and ran; the others stay what they are.

    Attributes:
        criterion: a name of :data:`droppeft.sharing.criteria.CRITERIA`.
        fraction: part of them that is shared, rounded to whole layers.
        hysteresis: by what part a layer must score higher to take the place of one that is kept.
        score_rows: rows of the client's validation part, for criteria that run the model.
        shared: layers that the client shared after its last merged turn; ``None`` before its first.
        usual: of each layer, what clients' gradient norms in it are like (1 on average), 0 where
            none is known; ``None`` for criteria that compare with nobody.
    """

    criterion: str
    fraction: float
    hysteresis: float
    score_rows: int
    shared: tuple[int, ...] | None
    typical: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains and measures; the same for all clients of a run, unless a method differs.

    Attributes:
        batch_size: rows of an optimizer step.
        learning_rate: AdamW's peak learning rate for the adapters.
        head_learning_rate: the same for the head's last linear map.
        schedule: course of both learning rates over the run, after the warm-up.
        warmup_fraction: part of the run that warms up.
        rounds: length of the run, over which the schedule is spread.
        weight_decay: AdamW's decoupled weight decay.
        clip_norm: largest global gradient norm.
        precision: of the forward pass; adapters, gradients and optimizer stay fp32.
        checkpointing: whether activations inside the layers are computed again in the backward.
        evaluation_batch_size: rows of a forward pass that measures.
    """

    batch_size: int
    learning_rate: float
    head_learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_fraction: float
    rounds: int
    weight_decay: float
    clip_norm: float
    precision: Literal["fp32", "bf16", "fp16"]
    checkpointing: bool
    evaluation_batch_size: int


@dataclass(frozen=True)
class StateCache:
    """How a client stores the hidden states that its frozen layers make of its rows.

    Attributes:
        precision: of what is stored.
        limit_bytes: on the client's disk; beyond it the oldest states are deleted.
    """

    precision: Literal["fp16", "bf16", "fp32"]
    limit_bytes: int


@dataclass(frozen=True)
class Budget:
    """How much work a turn is. Exactly one of the two is given; 0 steps only to measure."""

    steps: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Instruction:
    """What the server asks of one client in one round.

    Attributes:
        round: 1 for the first.
        client: the client's stable number (not the engine's node id).
        adapter: shapes of the trainable tensors.
        tensors: their values at the start of the turn, as far as the server has them.
        train: names of the tensors that are trained, ``None`` for all; the others are frozen for
            this turn, at the values in ``tensors`` or, if they are not there, at those that follow
            from the seed (FFA-LoRA's A).
        share: names of the tensors that may travel back; what is not named stays on the client.
            With :attr:`sharing`, so do the layers that the client then chooses to keep.
        dropout: gates, or ``None`` for full depth.
        objective: local loss.
        base_delta: change of the backbone during the turn, or ``None``.
        budget: length of the turn.
        training: batch size, learning rates, precision and the like.
        reward_rows: rows of the client's validation part on which the loss is measured before and
            after training, at full depth; 0 measures nothing.
        seed: the run's seed; the client derives its own draws from (seed, round, client).
        nonce: from the operating system, not from the seed; must come back in the Update, so
            that a replayed or misdirected answer is noticed.
        frozen: so many of the first layers have no adapter and are never dropped: what they make
            of an example may be kept on the client.
        run: names the run; part of the place where a client keeps what is its own.
        state_round: the round at whose end the client kept what it needs and is not in
            ``tensors``, or its own copy; ``None`` if it needs nothing of that kind.
        measure: the turn ends with a :class:`Measurement` of the client's own test rows, and
            changes nothing.
        untrained: so many of the first layers run, and nothing in them is trained.
        sharing: which layers are shared the client chooses; ``None``: :attr:`share` says it all.
        cache: how the states behind the frozen layers are stored; ``None``: they are computed in
            every step.
        arm: number of the configurator's arm that the turn follows, ``None`` without one. The
            client does nothing with it: merging reads from here which arm was tried.
        personal_adapter: weight lambda of (lambda/2)·‖v − w‖² with which the client then also
            trains a whole adapter v of its own, w being :attr:`tensors`, and keeps it (Ditto,
            arXiv:2012.04221); ``None``: it has none.
    """

    round: int
    client: int
    adapter: AdapterSpec
    tensors: Tensors
    train: frozenset[str] | None
    share: frozenset[str]
    dropout: LayerDropout | None
    objective: Objective
    base_delta: BaseDelta | None
    budget: Budget
    training: LocalTraining
    reward_rows: int
    seed: int
    nonce: str
    frozen: int = 0
    run: str = ""
    state_round: int | None = None
    measure: bool = False
    untrained: int = 0
    sharing: SharingRule | None = None
    cache: StateCache | None = None
    arm: int | None = None
    personal_adapter: float | None = None


@dataclass(frozen=True)
class CachedLayersCost:
    """What the frozen first layers cost in a turn; all 0 without them.

    Attributes:
        hits: rows whose hidden states were on the client already.
        built: rows whose hidden states were computed.
        built_tokens: their tokens, padding included.
        build_wall_s: computing and keeping them; part of the training steps' time.
        stored_bytes: on the client's disk after the turn.
    """

    hits: int = 0
    built: int = 0
    built_tokens: int = 0
    build_wall_s: float = 0.0
    stored_bytes: int = 0


@dataclass(frozen=True)
class MeasuredCost:
    """What a turn really cost on the machine that ran it.

    Attributes:
        total_wall_s: the whole turn, loading and packing included.
        train_wall_s: the training steps alone.
        reward_wall_s: measuring the reward, 0 if it was not asked for.
        activation_bytes_peak: most bytes stored for backward in any step, each storage counted
            once, parameters excluded.
        tokens: tokens trained on, padding included; those of skipped steps too.
        rows: rows they are of.
        layer_tokens: per layer, how many of them it computed.
        reward_tokens: tokens that measuring the reward ran through all layers, padding included.
        cached_layers: of the frozen first layers.
        scoring_tokens: tokens that scoring layers ran through all layers, padding included.
        scoring_wall_s: scoring them, as far as it is not done while training.
        personal_steps, personal_tokens, personal_wall_s: training an adapter of the client's own
            besides.
    """

    total_wall_s: float
    train_wall_s: float
    reward_wall_s: float
    activation_bytes_peak: int
    tokens: int
    rows: int
    layer_tokens: tuple[int, ...]
    reward_tokens: int
    cached_layers: CachedLayersCost = CachedLayersCost()
    scoring_tokens: int = 0
    scoring_wall_s: float = 0.0
    personal_steps: int = 0
    personal_tokens: int = 0
    personal_wall_s: float = 0.0


@dataclass(frozen=True)
class Update:
    """What a client answers.

    Attributes:
        round, client, nonce: copied from the instruction.
        tensors: trained values by layer: those that the instruction lets travel and the client
            shares, without layers that no step of the turn ran (they are as they were sent).
        examples: rows trained on in this turn (repeats counted).
        steps: optimizer steps taken.
        active_steps: per layer, in how many of them it ran.
        importance: per layer, mean over its active steps of the gradient norm of its adapter
            (METHOD: ``gradient_norm``); 0 for a layer that never ran.
        train_loss: mean over steps.
        reward: decrease of the loss on the client's validation rows, ``None`` if not asked for.
        cost: measured.
        shared: the layers that are shared from now on, in order: those that the client chose, and
            of those that the turn did not move the ones that were; ``None`` without a rule.
        scores: one per layer, by the rule's criterion, 0 where there was no choice; ``None``
            without a rule.
    """

    round: int
    client: int
    nonce: str
    tensors: Tensors
    examples: int
    steps: int
    active_steps: tuple[int, ...]
    importance: tuple[float, ...]
    train_loss: float
    reward: float | None
    cost: MeasuredCost
    shared: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Measurement:
    """What a client's own model is worth on its own test rows.

    Attributes:
        round, client, nonce: copied from the instruction.
        rows: how many were measured.
        accuracy: share of them that is right.
        loss: mean cross-entropy.
    """

    round: int
    client: int
    nonce: str
    rows: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, or whose answer was refused.

    Attributes:
        client: which.
        reason: one sentence.
        lost: it no longer has what it kept, and needs all tensors at its next turn.
    """

    client: int
    reason: str
    lost: bool = False


Reply = Update | Measurement | Failure
"""What comes back for an instruction."""


@dataclass(frozen=True)
class GlobalModel:
    """A model as the server holds it: shapes, values, and the change of the backbone if any."""

    adapter: AdapterSpec
    tensors: Tensors
    base_delta: BaseDelta | None = None


@dataclass(frozen=True)
class NoMemory:
    """The memory of a method that carries nothing besides its models."""


@dataclass(frozen=True)
class ServerState:
    """All that a method carries from one round to the next.

    Attributes:
        model: the model that is evaluated and exported.
        alternatives: further global models by name (the branches of FedAdapter).
        memory: anything else (what a bandit learnt, who keeps which layers): a frozen dataclass of
            the method's own, its ``Method.memory_type``. The round loop passes it through JSON
            after each merge, so a resumed run sees what an unbroken one sees.
    """

    model: GlobalModel
    alternatives: Mapping[str, GlobalModel] = field(default_factory=dict)
    memory: Any = NoMemory()


def checked_run(run: str) -> str:
    """The name of a run, which becomes part of a path on a client.

    Raises:
        DroppeftError: it is no name that a server of ours makes.
    """
    if not _RUN.fullmatch(run):
        raise DroppeftError(
            "the instruction names no run, and this client cannot keep anything for it"
        )
    return run


def layer_key(text: str) -> LayerKey:
    """The key that ``str`` made this text of."""
    return int(text) if text.isdigit() else text


def flatten(tensors: Tensors) -> Iterator[tuple[LayerKey, str, Array]]:
    """Yield (layer, name, array) in the tree's own order."""
    for key, named in tensors.items():
        for name, array in named.items():
            yield key, name, array


def first_trained_layer(instruction: Instruction) -> int:
    """Index of the first layer in which something is trained; below it nothing runs backward.

    What is trained in no layer, as a prompt, stands before the first.
    """
    if instruction.train is None or instruction.untrained > instruction.frozen:
        return max(instruction.frozen, instruction.untrained)
    trained = {key for key, name, _ in flatten(instruction.tensors) if name in instruction.train}
    if OTHER in trained:
        return instruction.frozen
    layers = [key for key in trained if isinstance(key, int)]
    return min(layers, default=len(instruction.adapter.layers))


def payload_bytes(tensors: Tensors) -> int:
    """Bytes of the arrays themselves, without a transport's framing."""
    return sum(array.nbytes for _, _, array in flatten(tensors))


def instruction_bytes(instruction: Instruction) -> int:
    """What an instruction downloads: tensors and base delta, without a transport's framing."""
    delta = instruction.base_delta.tensors.values() if instruction.base_delta else ()
    return payload_bytes(instruction.tensors) + sum(array.nbytes for array in delta)


def restrict(tensors: Tensors, names: frozenset[str]) -> Tensors:
    """Keep the named tensors; a layer left without any disappears."""
    kept = {
        key: {name: array for name, array in named.items() if name in names}
        for key, named in tensors.items()
    }
    return {key: named for key, named in kept.items() if named}
