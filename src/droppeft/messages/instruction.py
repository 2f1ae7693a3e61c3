"""What the server asks of one client in one round. Ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from droppeft.errors import DroppeftError
from droppeft.layer_dropout.modes import LayerModes
from droppeft.messages.encoding import Encoding, tensor_bytes
from droppeft.messages.tensors import OTHER, Array, Tensors, flatten

_RUN_NAME = re.compile(r"[0-9a-f]{1,64}")

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

    @property
    def first_layer(self) -> int:
        """Index of the first layer with an adapter; L if no layer has one."""
        return next((i for i, layer in enumerate(self.layers) if layer), len(self.layers))


@dataclass(frozen=True)
class LayerDropout:
    """How the layers that the steps of one local training skip are drawn.

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
        micro_batch_size: rows per forward and backward pass, whose gradients a step adds up;
            ``None`` for the whole batch.
        learning_rate: AdamW's peak learning rate for the adapters.
        head_learning_rate: the same for the last linear layer of the head.
        loraplus_lr_ratio: the learning rate of LoRA's B, as a multiple of ``learning_rate`` (LoRA+,
            arXiv:2402.12354).
        schedule: how both learning rates change over the run, after the warm-up.
        warmup_fraction: fraction of the run in which the learning rates rise linearly from 0.
        rounds: number of rounds of the run, over which the schedule extends.
        weight_decay: AdamW's decoupled weight decay.
        clip_norm: gradients are clipped to this global norm.
        precision: precision of frozen weights and of the forward pass. Adapters, gradients and
            optimizer stay in fp32.
        backbone_dropout: whether dropout modules of the frozen backbone drop values.
        checkpointing: whether the backward pass recomputes the activations inside the layers.
        evaluation_batch_size: rows per forward pass of an evaluation.
    """

    batch_size: int
    micro_batch_size: int | None
    learning_rate: float
    head_learning_rate: float
    loraplus_lr_ratio: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_fraction: float
    rounds: int
    weight_decay: float
    clip_norm: float
    precision: Literal["fp32", "bf16", "fp16"]
    backbone_dropout: bool
    checkpointing: bool
    evaluation_batch_size: int

    @property
    def rows_at_once(self) -> int:
        """Rows of a forward and backward pass."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


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
        dropout: how layers to skip are drawn; ``None`` skips none.
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
        starts: candidates for the lowest trained layer; each step draws one of them. Layers below
            it run forward only.
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
        encoding: how tensors travel, in both directions. The server's own copy of an instruction
            has fp32 values; on the way they are encoded.
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
    starts: tuple[int, ...] = (0,)
    sharing: SharingRule | None = None
    cache: StateCache | None = None
    arm: int | None = None
    personal_adapter: float | None = None
    generation: TextGeneration | None = None
    validation_rows: int = 0
    encoding: Encoding = "fp32"


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


def first_trained_layer(instruction: Instruction) -> int:
    """Return the index of the first layer that any step may train; L if no layer is trained."""
    return min(modes_of(instruction).starts)


def modes_of(instruction: Instruction) -> LayerModes:
    """Return the distribution over the modes of layers that an instruction asks for.

    Raises:
        DroppeftError: a start or a rate is impossible.
    """
    dropout, frozen = instruction.dropout, instruction.frozen
    # Layers below all starts have no tensors to train, and those above may be on the client alone.
    lowest = frozen if min(instruction.starts) > frozen else _first_with_trained(instruction)
    return LayerModes(
        layers=len(instruction.adapter.layers),
        frozen=frozen,
        cached=instruction.cache is not None,
        starts=tuple(max(start, lowest) for start in instruction.starts),
        rates=dropout.rates if dropout else None,
        sampling=dropout.sampling if dropout else "exact",
        every=dropout.every if dropout else 1,
    )


def _first_with_trained(instruction: Instruction) -> int:
    """Return the first layer that has trained tensors.

    Trained tensors that are not part of a layer, such as a soft prompt, come before all layers.
    """
    if instruction.train is None:
        return instruction.frozen
    trained = {key for key, name, _ in flatten(instruction.tensors) if name in instruction.train}
    if OTHER in trained:
        return instruction.frozen
    layers = [key for key in trained if isinstance(key, int)]
    return min(layers, default=len(instruction.adapter.layers))


def instruction_bytes(instruction: Instruction) -> int:
    """Return the bytes of an instruction's tensors, as they travel, and of its base delta.

    The overhead of a transport is not counted.
    """
    delta = instruction.base_delta.tensors.values() if instruction.base_delta else ()
    sent = tensor_bytes(instruction.tensors, instruction.encoding)
    return sent + sum(array.nbytes for array in delta)
