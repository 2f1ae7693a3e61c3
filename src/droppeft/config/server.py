"""The server table: bounds on single updates, how they are combined, and server optimisers."""

from typing import Literal

from pydantic import Field, field_validator

from droppeft.config.table import Real, Table

STEP_SIZES = {"momentum": 1.0, "adam": 0.01, "yogi": 0.01}


class ServerConfig(Table):
    """What the server does with a round's updates: it bounds, combines and applies them."""

    clip_norm_multiple: Real = Field(
        2.0,
        ge=0,
        description="in each layer, a change whose norm is more than this multiple of the median "
        "norm among the round's updates is scaled down to the median; 1 or more, or 0: no limit",
    )
    max_weight_multiple: Real = Field(
        2.0,
        ge=0,
        description="an update counts in a mean for at most this multiple of the round's median "
        "weight (rows or tokens); 1 or more, or 0: no limit",
    )
    direction_check: bool = Field(
        True,
        description="leave out the updates of clients whose changes, over the run so far, point "
        "against those of the others; needs 20 updates in a round",
    )
    merge: Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"] = Field(
        "mean",
        description="`mean`: the method's own merge; `median`, `trimmed_mean`: each value is that "
        "of its senders, without weights; `krum`: the update that is nearest to its neighbours; "
        "`multi_krum`: all but the farthest",
    )
    malicious_fraction: Real = Field(
        0.2,
        gt=0,
        lt=0.5,
        description="share of a round's updates that `trimmed_mean` cuts off at either end, and "
        "that `krum` and `multi_krum` assume to be malicious; rounded up",
    )
    optimizer: Literal["none", "momentum", "adam", "yogi"] = Field(
        "none",
        description="`none`: take the mean itself; `momentum`: FedAvgM; `adam`, `yogi`: FedAdam, "
        "FedYogi",
    )
    step_size: Real | None = Field(
        None, gt=0, description="the optimiser's rate (1 with `momentum`, 0.01 otherwise)"
    )

    @field_validator("clip_norm_multiple", "max_weight_multiple")
    @classmethod
    def _one_or_more(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("must be 1 or more, or 0 for no limit")
        return value

    @property
    def rate(self) -> float:
        """The given step size, or the optimiser's default."""
        return self.step_size or STEP_SIZES.get(self.optimizer, 1.0)
