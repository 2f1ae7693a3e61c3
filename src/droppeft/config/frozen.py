"""The frozen table: the first layers, which are not trained."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from droppeft.config.table import Real, Table

HALF = "half"


def _layers_or_half(value: object) -> object:
    if value == HALF or (type(value) is int and value >= 0):
        return value
    raise ValueError("must be a number of layers, 0 or more, or half")


class FrozenConfig(Table):
    """The first layers, which have no adapter and are never dropped."""

    layers: Annotated[int | Literal["half"], BeforeValidator(_layers_or_half)] = Field(
        0,
        description="number of frozen layers, or `half` of the model's, rounded down; their "
        "dropout modules are off. `dropout.mean`, `dropout.count` and the protected layers "
        "refer to the layers above them",
    )
    cache: bool = Field(
        True,
        description="store their output for each row on the client's disk, so that they run once "
        "per row; otherwise they run in every step, without a backward pass",
    )
    precision: Literal["fp16", "bf16", "fp32"] = Field(
        "fp16", description="precision of their output, also when a row is used for the first time"
    )
    limit_mb: Real = Field(
        2048.0,
        gt=0,
        description="largest cache of a client, in MB; beyond it the oldest entries are deleted",
    )

    @property
    def count(self) -> int:
        """How many layers are frozen; ``half`` must have been resolved."""
        if isinstance(self.layers, int):
            return self.layers
        raise ValueError(f"frozen.layers={self.layers} before the model's layers are known")
