"""The dropout table: layer dropout."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from droppeft.config.exclusive import EXCLUSIVE, with_default
from droppeft.config.table import Real, Table, Whole

DEFAULT_MEAN_RATE = 1 / 3

CALIBRATED = "calibrated"
"""The shape whose rates follow from a measurement of every layer."""

NO_CALIBRATION = (
    "dropout.shape=calibrated needs a calibration, and there is none; give dropout.rates instead, "
    "as `droppeft calibrate` prints them"
)

ENDS = ("protect_first", "protect_last")


def _steps_or_round(value: object) -> object:
    if value == "round" or (type(value) is int and value >= 1):
        return value
    raise ValueError("must be a number of steps, 1 or more, or round")


class DropoutConfig(Table):
    """Stochastic transformer layer dropout; used by the methods that drop layers."""

    mean: Real | None = Field(
        None, ge=0, le=1, description="mean drop rate over all layers (1/3 if nothing is given)"
    )
    count: Whole | None = Field(
        None, ge=0, description="instead of mean: mean number of dropped layers per step"
    )
    rates: tuple[float, ...] | None = Field(
        None, description="instead of mean and shape: the drop rate of each layer"
    )
    shape: Literal["uniform", "incremental", "decay", "normal", "calibrated"] = Field(
        "uniform",
        description="how drop rates vary with depth, at the same mean; `calibrated`: layers whose "
        "loss is small when they are skipped are dropped most, and expensive ones never (measured "
        "before round 1 on training rows that no client gets)",
    )
    sampling: Literal["exact", "bernoulli"] = Field(
        "exact",
        description="`exact`: the same number of layers in every step; `bernoulli`: each layer is "
        "dropped independently",
    )
    every: Annotated[int | Literal["round"], BeforeValidator(_steps_or_round)] = Field(
        1,
        description="optimizer steps for which drawn gates are used, 1 or more; `round`: a "
        "client's whole local training",
    )
    schedule: Literal["constant", "warm_up", "recovery"] = Field(
        "constant",
        description="drop rates over the run: `warm_up` increases them from 0 in the first 30 % "
        "of the rounds, `recovery` trains the last 30 % at full depth",
    )
    protect_first: Whole = Field(
        1,
        ge=0,
        description="first layers that are never dropped (0 by default with `shape=calibrated`)",
    )
    protect_last: Whole = Field(
        1,
        ge=0,
        description="last layers that are never dropped (0 by default with `shape=calibrated`)",
    )

    @field_validator("rates")
    @classmethod
    def _probabilities(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not all(0 <= rate <= 1 for rate in value):
            raise ValueError("every rate must lie between 0 and 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _a_third_unless_said(cls, value: Any) -> Any:
        return with_default(value, EXCLUSIVE["dropout"], DEFAULT_MEAN_RATE)

    @model_validator(mode="before")
    @classmethod
    def _measured_layers_are_protected(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("shape") == CALIBRATED:
            return {**dict.fromkeys(ENDS, 0), **value}
        return value

    @model_validator(mode="after")
    def _one_of_three(self) -> "DropoutConfig":
        if sum(value is not None for value in (self.mean, self.count, self.rates)) > 1:
            raise ValueError("give only one of dropout.mean, dropout.count and dropout.rates")
        if self.rates is not None and self.shape == CALIBRATED:
            raise ValueError(
                "dropout.rates has the rates of all layers, so that dropout.shape=calibrated has "
                "no effect; give one of the two"
            )
        return self
