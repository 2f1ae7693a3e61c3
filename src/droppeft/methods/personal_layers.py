"""Personalised layer sharing on the server: what an instruction brings, and how a client chooses.

Source: DropPEFT (arXiv:2503.10217); docs/concepts/layer_sharing.md says what is ours. A client gets
the global values of the layers that it shared in its last participation; the other layers are
personal and in its client state. After its local training the client chooses the layers that it
shares next, by the rule in the instruction.
"""

from dataclasses import replace

from droppeft.adapters.types import TYPES
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import Setup
from droppeft.messages.instruction import AdapterSpec, Instruction, SharingRule
from droppeft.messages.server_state import ServerState
from droppeft.messages.tensors import HEAD, LayerKey, flatten
from droppeft.sharing.criteria import CRITERIA, typical_norms
from droppeft.sharing.participation import Participation, last_participation, norms_of_clients
from droppeft.sharing.selection import count_of


def has_personal_layers(config: Config) -> bool:
    """Whether some layers of a client are personal."""
    return config.sharing.fraction < 1


def has_personal_tensors(config: Config) -> bool:
    """Whether some layers or the head are personal."""
    return has_personal_layers(config) or not has_global_head(config)


def has_global_head(config: Config) -> bool:
    """Whether the head is shared; the global head is never trained otherwise."""
    return config.sharing.head == "shared"


def check_fraction(setup: Setup) -> None:
    """Refuse a fraction that is less than one layer of the model.

    Raises:
        DroppeftError: if it is too small; the message says what to set instead.
    """
    fraction = setup.config.sharing.fraction
    layers = setup.num_layers - setup.config.frozen.count
    if layers > 0 and fraction and not count_of(fraction, layers):
        raise DroppeftError(
            f"sharing.fraction={fraction:g} of {layers} layers is none; set it to "
            f"{1 / layers:.2g} for one layer, or to 0"
        )


def check_sharing(config: Config) -> None:
    """Refuse settings of ``sharing`` that cannot work.

    Raises:
        DroppeftError: if there are any; the message says what to set instead.
    """
    if has_personal_layers(config) and TYPES[config.adapter.type].kind == "global":
        raise DroppeftError(
            f"adapter.type={config.adapter.type} is in no layer, so that no layer can be personal; "
            "set sharing.fraction=1"
        )


def typical_of(setup: Setup, state: ServerState) -> tuple[float, ...] | None:
    """The clients' typical gradient norm in each layer, if the criterion uses it."""
    compares = (
        has_personal_layers(setup.config) and CRITERIA[setup.config.sharing.criterion].compares
    )
    return typical_norms(norms_of_clients(state)) if compares else None


def with_sharing(
    setup: Setup,
    state: ServerState,
    instruction: Instruction,
    typical: tuple[float, ...] | None = None,
) -> Instruction:
    """The instruction without the tensors that the client has saved, and with the sharing rule.

    Args:
        instruction: contains all tensors of the global model.
        typical: result of :func:`typical_of`; needed only if the instruction is to train.
    """
    config = setup.config
    if not has_personal_tensors(config):
        return instruction
    personal: frozenset[LayerKey] = frozenset(() if has_global_head(config) else {HEAD})
    last = last_participation(state, instruction.client)
    saved = personal | _personal_layers(instruction.adapter, last) if last else frozenset()
    may_be_sent = frozenset(
        name for key, name, _ in flatten(instruction.tensors) if key not in personal
    )
    return replace(
        instruction,
        tensors={key: named for key, named in instruction.tensors.items() if key not in saved},
        share=instruction.share & may_be_sent,
        state_round=last.round if last and saved else None,
        sharing=_rule(setup, last, typical) if has_personal_layers(config) else None,
    )


def _rule(
    setup: Setup, last: Participation | None, typical: tuple[float, ...] | None
) -> SharingRule:
    settings = setup.config.sharing
    # Scores by position never change, so that there is nothing to stabilise.
    scores_change = settings.criterion != "position"
    return SharingRule(
        criterion=settings.criterion,
        fraction=settings.fraction,
        hysteresis=settings.hysteresis if scores_change else 0.0,
        shared=last.shared if last else None,
        typical=typical,
    )


def _personal_layers(adapter: AdapterSpec, last: Participation) -> frozenset[LayerKey]:
    """The layers that the client did not share in its last participation."""
    if last.shared is None:
        return frozenset()
    return frozenset(
        index
        for index, layer in enumerate(adapter.layers)
        if layer is not None and index not in last.shared
    )
