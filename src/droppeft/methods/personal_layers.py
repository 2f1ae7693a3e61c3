"""Personalised layer sharing on the server: what of an instruction a client already has. Source:
METHOD 4.

A client that was merged before gets the global values of the layers that it shared then; the others
it has kept. What it shares this time it chooses after its training, by the rule in the instruction.
"""

from dataclasses import replace

from droppeft.adapters.types import TYPES
from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import Setup
from droppeft.messages import (
    HEAD,
    AdapterSpec,
    Instruction,
    LayerKey,
    ServerState,
    SharingRule,
    flatten,
)
from droppeft.sharing.aggregation import Weight, by_active_steps, by_examples
from droppeft.sharing.criteria import CKA_ROWS, CRITERIA, typical_norms
from droppeft.sharing.participation import Participation, last_participation, norms_of_clients
from droppeft.sharing.selection import count_of


def keeps_layers(config: Config) -> bool:
    """Whether clients keep any layer to themselves."""
    return config.sharing.fraction < 1


def keeps_anything(config: Config) -> bool:
    """Whether clients keep layers or the head."""
    return keeps_layers(config) or not has_global_head(config)


def has_global_head(config: Config) -> bool:
    """Whether the head travels; otherwise the global one is never trained."""
    return config.sharing.head == "shared"


def check_fraction(setup: Setup) -> None:
    """Refuse a fraction that is not one layer of the model.

    Raises:
        DroppeftError: with what to set instead.
    """
    fraction = setup.config.sharing.fraction
    layers = setup.num_layers - setup.config.frozen.count
    if layers > 0 and fraction and not count_of(fraction, layers):
        raise DroppeftError(
            f"sharing.fraction={fraction:g} of {layers} layers is none; set "
            f"{1 / layers:.2g} for one of them, or 0"
        )


def check_sharing(config: Config) -> None:
    """Refuse what cannot be shared by layer.

    Raises:
        DroppeftError: with what to set instead.
    """
    if keeps_layers(config) and TYPES[config.adapter.type].kind == "global":
        raise DroppeftError(
            f"adapter.type={config.adapter.type} is in no layer, so that no layers can be kept; "
            "set sharing.fraction=1"
        )
    few = config.sharing.score_rows < CKA_ROWS
    if keeps_layers(config) and config.sharing.criterion == "cka" and few:
        raise DroppeftError(
            f"sharing.criterion=cka compares rows with each other, for which it takes {CKA_ROWS}; "
            f"set sharing.score_rows={CKA_ROWS} or more"
        )
    if config.sharing.factors == "product" and config.server.optimizer != "none":
        raise DroppeftError(
            "sharing.factors=product makes LoRA's factors anew every round, and what they change "
            f"by is no gradient for server.optimizer={config.server.optimizer}; leave one out"
        )
    if config.sharing.mean == "everyone" and config.sharing.factors == "product":
        raise DroppeftError(
            "sharing.mean=everyone is a control for factors that are averaged by themselves; "
            "set sharing.factors=separate"
        )
    if config.sharing.factors == "product" and config.adapter.type != "lora":
        raise DroppeftError(
            f"sharing.factors=product is about LoRA's A and B; adapter.type={config.adapter.type} "
            "has none, leave it out"
        )


def typical_of(setup: Setup, state: ServerState) -> tuple[float, ...] | None:
    """What clients' gradients are like, where the run's criterion compares with that."""
    compares = keeps_layers(setup.config) and CRITERIA[setup.config.sharing.criterion].compares
    return typical_norms(norms_of_clients(state)) if compares else None


def with_sharing(
    setup: Setup,
    state: ServerState,
    instruction: Instruction,
    typical: tuple[float, ...] | None = None,
) -> Instruction:
    """An instruction of whole tensors, less what this client keeps, and with the rule of the run.

    Args:
        usual: as :func:`usual_of`, for an instruction with steps.
    """
    config = setup.config
    if not keeps_anything(config):
        return instruction
    personal: frozenset[LayerKey] = frozenset(() if has_global_head(config) else {HEAD})
    last = last_participation(state, instruction.client)
    kept = personal | _kept_layers(instruction.adapter, last) if last else frozenset()
    travels = frozenset(
        name for key, name, _ in flatten(instruction.tensors) if key not in personal
    )
    return replace(
        instruction,
        tensors={key: named for key, named in instruction.tensors.items() if key not in kept},
        share=instruction.share & travels,
        state_round=last.round if last and kept else None,
        sharing=_rule(setup, last, typical) if keeps_layers(config) else None,
    )


def weight_of(config: Config) -> Weight:
    """What a client's layer counts in the mean."""
    return by_examples if config.sharing.weights == "examples" else by_active_steps


def _rule(
    setup: Setup, last: Participation | None, typical: tuple[float, ...] | None
) -> SharingRule:
    settings = setup.config.sharing
    # A place does not change: there are no flaps that it would have to keep from.
    flaps = settings.criterion != "position"
    return SharingRule(
        criterion=settings.criterion,
        fraction=settings.fraction,
        hysteresis=settings.hysteresis if flaps else 0.0,
        score_rows=settings.score_rows,
        shared=last.shared if last else None,
        typical=typical,
    )


def _kept_layers(adapter: AdapterSpec, last: Participation) -> frozenset[LayerKey]:
    """Those that the client did not share; without a choice it shared all."""
    if last.shared is None:
        return frozenset()
    return frozenset(layer for layer in _layers(adapter) if layer not in last.shared)


def _layers(adapter: AdapterSpec) -> list[int]:
    return [index for index, layer in enumerate(adapter.layers) if layer is not None]
