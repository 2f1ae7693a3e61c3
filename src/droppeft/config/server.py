"""The server table: how the server applies the mean of a round's updates."""

from typing import Literal

from pydantic import Field

from droppeft.config.table import Real, Table

STEP_SIZES = {"momentum": 1.0, "adam": 0.01, "yogi": 0.01}


class ServerConfig(Table):
    """Server optimisers (FedOpt): the mean change of a round is used as a gradient."""

    optimizer: Literal["none", "momentum", "adam", "yogi"] = Field(
        "none",
        description="`none`: take the mean itself; `momentum`: FedAvgM; `adam`, `yogi`: FedAdam, "
        "FedYogi",
    )
    step_size: Real | None = Field(
        None, gt=0, description="the optimiser's rate (1 with `momentum`, 0.01 otherwise)"
    )

    @property
    def rate(self) -> float:
        """The given step size, or the optimiser's default."""
        return self.step_size or STEP_SIZES.get(self.optimizer, 1.0)
