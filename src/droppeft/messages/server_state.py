"""What a method carries from one round to the next. Ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from droppeft.messages.instruction import AdapterSpec, BaseDelta
from droppeft.messages.tensors import Tensors


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
        agreement: by client that took part, how far its changes agreed with those of the others,
            summed over its rounds. The round loop keeps it, and no method needs it.
    """

    model: GlobalModel
    alternatives: Mapping[str, GlobalModel] = field(default_factory=dict)
    memory: Any = NoMemory()
    agreement: Mapping[int, float] = field(default_factory=dict)
