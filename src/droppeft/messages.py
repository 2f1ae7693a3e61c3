"""The messages of a round: the server's instruction to one client, and the client's reply.

In every round the server sends an :class:`Instruction` to each client of the cohort. The client
replies with an :class:`Update` if it trained, with a :class:`EvaluationReply` if it only evaluated
its model, or with a :class:`Failure`. What a method carries from one round to the next is a
:class:`ServerState`.

All messages are frozen dataclasses of numbers, strings and numpy arrays, so this module needs
neither torch nor a transport. ``docs/reference/source_code.md`` shows how each method uses them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from droppeft.errors import DroppeftError
from droppeft.refusals import FOR_GOOD, STATE_LOST, Refused

_RUN_NAME = re.compile(r"[0-9a-f]{1,64}")

Array = npt.NDArray[np.generic]

LayerKey = int | str
"""Where a trainable tensor belongs: a layer index (0 is nearest the input), ``"head"`` (the task
head) or ``"other"`` (trainable but not part of a layer, such as a soft prompt)."""

HEAD: LayerKey = "head"
OTHER: LayerKey = "other"

Tensors = Mapping[LayerKey, Mapping[str, Array]]
"""Trainable tensors by layer, then by parameter name."""

Layout = Mapping[str, tuple[LayerKey, tuple[int, ...]]]
"""The trainable tensors of an adapter, without values: parameter name to (layer, shape)."""

OptionValue = bool | int | float | str | tuple[str, ...]
"""Value of an option of a PEFT configuration class."""


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer.

    Attributes:
        type: a name of ``droppeft.adapters.types.TYPES``, for example ``"lora"``.
        rank: the rank r. ``None`` means the type's default, or that the type has no rank.
        width: the inner width of a bottleneck adapter; ``None`` for other types.
    """

    type: str
    rank: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter of every layer, and the settings that they have in common.

    ``None`` means the default of the adapter type, or that the type has no such setting.

    Attributes:
        layers: one entry per layer, ``None`` where the layer has no adapter. A soft prompt is not
            part of a layer; its type is given in every entry.
        alpha: LoRA's alpha; the output of a LoRA adapter is scaled by alpha / rank.
        dropout: dropout probability on the adapter's input.
        targets: names of the adapted modules, or ``("default",)`` or ``("all-linear",)``.
        tokens: number of virtual tokens of prefix tuning or prompt tuning.
        options: further options, named as in the PEFT configuration class of the type.
    """

    layers: tuple[LayerAdapter | None, ...]
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] = ("default",)
    tokens: int | None = None
    options: tuple[tuple[str, OptionValue], ...] = ()


@dataclass(frozen=True)
class LayerDropout:
    """How the gates of one local training are drawn.

    Attributes:
        rates: the probability that a layer is dropped, one per layer, each in [0, 1].
        sampling: ``"exact"`` (the same number of layers is dropped in every step) or
            ``"bernoulli"`` (each layer is drawn independently).
        every: number of steps for which the same gates are used; ``None`` for the whole local
            training.
    """

    rates: tuple[float, ...]
    sampling: Literal["exact", "bernoulli"]
    every: int | None = 1


@dataclass(frozen=True)
class RankPenalty:
    """A penalty that makes the last ranks of LoRA small (HetLoRA, arXiv:2401.06432).

    Attributes:
        weight: weight of the sum of ‖B[:, m:]‖·‖A[m:]‖ over LoRA's pairs (Frobenius norms).
        unpenalised: number m of the first ranks, which are not penalised.
    """

    weight: float
    unpenalised: int


@dataclass(frozen=True)
class Objective:
    """What a method adds to the task's loss in local training.

    Attributes:
        proximal: weight mu of (mu/2)·‖w − w_received‖² over the trainable tensors (FedProx,
            arXiv:1812.06127); 0 adds nothing and costs nothing.
        rank_penalty: penalty on LoRA's last ranks, or ``None``.
    """

    proximal: float = 0.0
    rank_penalty: RankPenalty | None = None


TASK_ALONE = Objective()
"""Nothing is added to the task's loss."""


@dataclass(frozen=True)
class BaseDelta:
    """A change of the frozen backbone, in force during one local training or evaluation.

    Attributes:
        version: identifies the content. Hidden states that are cached under another version are
            not used.
        tensors: what is added to each weight, by its parameter name in the backbone. The shape is
            that of the weight, for a linear layer (out, in).
    """

    version: str
    tensors: Mapping[str, Array]


@dataclass(frozen=True)
class SharingRule:
    """How a client chooses the layers that it shares, after local training (arXiv:2503.10217).

    The client chooses among the layers that were trained and that ran in at least one step. Every
    other layer stays as it was, shared or personal.

    Attributes:
        criterion: a name of :data:`droppeft.sharing.criteria.CRITERIA`. The layers that score
            lowest are shared.
        fraction: fraction of these layers that is shared, rounded to whole layers.
        hysteresis: relative margin by which a shared layer must score higher than a personal one
            before the two change places.
        shared: the layers that the client shared in its last participation; ``None`` before the
            first one.
        typical: the typical gradient norm of each layer among clients (1 on average), 0 where
            none is known; ``None`` for criteria that do not compare clients.
    """

    criterion: str
    fraction: float
    hysteresis: float
    shared: tuple[int, ...] | None
    typical: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LocalTraining:
    """The settings of local training and evaluation.

    They are the same for all clients of a run unless the method says otherwise.

    Attributes:
        batch_size: rows per optimizer step.
        learning_rate: AdamW's peak learning rate for the adapters.
        head_learning_rate: the same for the last linear layer of the head.
        schedule: how both learning rates change over the run, after the warm-up.
        warmup_fraction: fraction of the run in which the learning rates rise linearly from 0.
        rounds: number of rounds of the run, over which the schedule extends.
        weight_decay: AdamW's decoupled weight decay.
        clip_norm: gradients are clipped to this global norm.
        precision: precision of the forward pass. Adapters, gradients and optimizer stay in fp32.
        checkpointing: whether the backward pass recomputes the activations inside the layers.
        evaluation_batch_size: rows per forward pass of an evaluation.
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
    """How a client stores the hidden states that its frozen layers compute.

    Attributes:
        precision: precision of the stored states.
        limit_bytes: most bytes on the client's disk. Beyond it the oldest states are deleted.
    """

    precision: Literal["fp16", "bf16", "fp32"]
    limit_bytes: int


@dataclass(frozen=True)
class TextGeneration:
    """Which texts a client generates when it evaluates its model.

    Attributes:
        rows: most test rows whose completions are generated.
        max_length: longest prompt in tokens; of a longer one the middle is left out.
        max_new_tokens: most tokens of a completion.
    """

    rows: int
    max_length: int
    max_new_tokens: int


@dataclass(frozen=True)
class Budget:
    """The length of a local training, in optimizer steps or in epochs.

    Exactly one of the two is given. An instruction that only evaluates has 0 steps.
    """

    steps: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Instruction:
    """What the server asks of one client in one round.

    Attributes:
        round: number of the round, from 1.
        client: number of the client, from 0. It is not the node id of a transport.
        adapter: the adapter that is attached; it determines the shapes of the trainable tensors.
        tensors: the values that local training begins with, as far as the server holds them.
        train: names of the tensors that are trained, ``None`` for all. The others are frozen, at
            the value in ``tensors`` or, if that has none, at the initial value that follows from
            the seed (as FFA-LoRA's A).
        share: names of the tensors that may be sent to the server. All others stay on the client.
            With :attr:`sharing`, so do the layers that the client does not choose to share.
        dropout: how gates are drawn; ``None`` runs all layers in every step.
        objective: what is added to the task's loss.
        base_delta: change of the backbone while this instruction runs, or ``None``.
        budget: length of the local training.
        training: batch size, learning rates, precision and further settings of local training.
        reward_rows: number of the client's validation rows on which the loss is measured before
            and after training, with all layers; 0 measures nothing.
        seed: the run's seed. The client derives its random draws from (seed, round, client).
        nonce: a random string from the operating system, independent of the seed. The reply must
            repeat it, so that a replayed or misdirected reply is noticed.
        frozen: number of first layers that have no adapter and are never dropped. The client may
            cache their output.
        run: name of the run; part of the path of the client's saved state.
        state_round: the round in which the client saved the tensors that it needs and that
            ``tensors`` lacks, or its personal adapter; ``None`` if it needs no saved tensors.
        evaluate_only: whether the client only evaluates its model. It then replies with an
            :class:`EvaluationReply` and saves no tensors.
        untrained: number of first layers that run but are not trained.
        sharing: how the client chooses the layers that it shares; ``None`` if :attr:`share` alone
            decides.
        cache: how the output of the frozen layers is stored; ``None`` computes it in every step.
        arm: number of the bandit's arm that this instruction follows, or ``None``. The client
            ignores it; the server reads it when it merges the update.
        personal_adapter: weight lambda of (lambda/2)·‖v − w‖², with which the client also trains
            and saves a personal adapter v (Ditto, arXiv:2012.04221); w is :attr:`tensors`.
            ``None``: there is no personal adapter.
        generation: the texts that a client generates which only evaluates; ``None`` for no texts.
        validation_rows: most validation rows on which a client measures that only evaluates; 0
            for all of its test rows.
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
    evaluate_only: bool = False
    untrained: int = 0
    sharing: SharingRule | None = None
    cache: StateCache | None = None
    arm: int | None = None
    personal_adapter: float | None = None
    generation: TextGeneration | None = None
    validation_rows: int = 0


@dataclass(frozen=True)
class CachedLayersCost:
    """Cost of the frozen layers in one local training; all 0 without frozen layers.

    Attributes:
        hits: rows whose hidden states were already on the client's disk.
        built: rows whose hidden states were computed.
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
        layer_tokens: per layer, how many of these tokens it computed.
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
            client shares them. Layers that ran in no step are left out, as they did not change.
        examples: rows trained on, repetitions counted.
        targets: predictions trained on: the same rows, or the tokens of completions. It is the
            update's weight in a mean.
        steps: optimizer steps taken.
        active_steps: per layer, the number of steps in which it ran.
        importance: per layer, the gradient norm of its adapter, mean over its active steps; 0 for
            a layer that never ran.
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


@dataclass(frozen=True)
class GlobalModel:
    """A model as the server holds it.

    Attributes:
        adapter: the adapter, which determines the shapes of the tensors.
        tensors: the values of its trainable tensors.
        base_delta: change of the backbone, or ``None``.
    """

    adapter: AdapterSpec
    tensors: Tensors
    base_delta: BaseDelta | None = None


@dataclass(frozen=True)
class NoMemory:
    """Memory of a method that carries nothing but its models from round to round."""


@dataclass(frozen=True)
class ServerState:
    """All that a method carries from one round to the next.

    Attributes:
        model: the global model, which is evaluated and exported.
        alternatives: further global models by name, such as the branches of FedAdapter.
        memory: everything else, such as a bandit's statistics or which client shares which layers.
            It is an instance of the method's ``Method.memory_type``, a frozen dataclass. After each
            merge the round loop converts it to JSON and back, so that a resumed run sees the same
            values as an uninterrupted one.
    """

    model: GlobalModel
    alternatives: Mapping[str, GlobalModel] = field(default_factory=dict)
    memory: Any = NoMemory()


def checked_run(run: str) -> str:
    """Return a run's name if it is valid; it becomes part of a path on the client.

    Raises:
        DroppeftError: the name is not 1 to 64 lowercase hexadecimal digits.
    """
    if not _RUN_NAME.fullmatch(run):
        raise DroppeftError(
            "the instruction has no valid run name, so this client cannot save anything for it; "
            "the name must be 1 to 64 lowercase hexadecimal digits"
        )
    return run


def layer_key(text: str) -> LayerKey:
    """Return the layer key for its text form; the inverse of ``str``."""
    return int(text) if text.isdigit() else text


def flatten(tensors: Tensors) -> Iterator[tuple[LayerKey, str, Array]]:
    """Yield (layer, name, array) in the order of the mappings."""
    for key, named in tensors.items():
        for name, array in named.items():
            yield key, name, array


def first_trained_layer(instruction: Instruction) -> int:
    """Return the index of the first trained layer, below which no backward pass is needed.

    Trained tensors that are not part of a layer, such as a soft prompt, come before all layers.
    """
    if instruction.train is None or instruction.untrained > instruction.frozen:
        return max(instruction.frozen, instruction.untrained)
    trained = {key for key, name, _ in flatten(instruction.tensors) if name in instruction.train}
    if OTHER in trained:
        return instruction.frozen
    layers = [key for key in trained if isinstance(key, int)]
    return min(layers, default=len(instruction.adapter.layers))


def payload_bytes(tensors: Tensors) -> int:
    """Return the bytes of the arrays, without the overhead of a transport."""
    return sum(array.nbytes for _, _, array in flatten(tensors))


def instruction_bytes(instruction: Instruction) -> int:
    """Return the bytes of an instruction's tensors and base delta, without transport overhead."""
    delta = instruction.base_delta.tensors.values() if instruction.base_delta else ()
    return payload_bytes(instruction.tensors) + sum(array.nbytes for array in delta)


def restrict(tensors: Tensors, names: frozenset[str]) -> Tensors:
    """Return the named tensors only; a layer that has none of them is left out."""
    selected = {
        key: {name: array for name, array in named.items() if name in names}
        for key, named in tensors.items()
    }
    return {key: named for key, named in selected.items() if named}
