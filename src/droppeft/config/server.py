"""The server table: what the server makes of the mean of a round's updates."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from droppeft.config.base import Real, Table

LEARNING_RATES = {"momentum": 1.0, "adam": 0.01, "yogi": 0.01}


class ServerConfig(Table):
    """Server optimisers (FedOpt): the mean change of a round is taken for a gradient."""

    optimizer: Literal["none", "momentum", "adam", "yogi"] = Field(
        "none",
        description="`none`: the mean itself; `momentum`: FedAvgM; `adam`, `yogi`: FedAdam, "
        "FedYogi",
    )
    learning_rate: Real | None = Field(
        None, gt=0, description="of the optimiser (1 with `momentum`, 0.01 otherwise)"
    )
    momentum: Real = Field(0.9, ge=0, lt=1, description="of the mean change")
    second_momentum: Real = Field(
        0.99, ge=0, lt=1, description="of its square, with `adam` and `yogi`"
    )
    tau: Real = Field(
        1e-3, gt=0, description="how adaptive `adam` and `yogi` are: small is more so"
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_rate(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("learning_rate") is not None:
            return value
        usual = LEARNING_RATES.get(str(value.get("optimizer", "none")))
        return value if usual is None else {**value, "learning_rate": usual}
