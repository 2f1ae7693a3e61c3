"""The modelled clock's table: device profiles, deadline, over-selection."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from droppeft.config.table import Real, Table, TextList


class Bandwidth(Table):
    """Bytes per second of a link, drawn each round from a normal distribution and clipped.

    Attributes:
        mean, deviation: of the normal distribution.
        least, most: bounds to which a draw is clipped.
    """

    mean: Real = Field(gt=0)
    deviation: Real = Field(0.0, ge=0)
    least: Real | None = Field(None, gt=0)
    most: Real | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check_bounds(self) -> "Bandwidth":
        if self.deviation and (self.least is None or self.most is None):
            raise ValueError("a bandwidth with a deviation needs least and most")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError("least is more than most")
        return self


def _fixed_or_drawn(value: object) -> object:
    """Accept a number for a bandwidth that never changes."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"mean": value} if is_number else value


Link = Annotated[Bandwidth, BeforeValidator(_fixed_or_drawn)]


class DeviceProfile(Table):
    """A kind of device hardware, as far as the modelled clock needs to know it.

    Attributes:
        peak_flops_per_s: according to the data sheet; only displayed.
        effective_flops_per_s: reached in training.
        step_overhead_s: fixed time of each optimizer step.
        memory_bytes: available to a training process.
        idle_watts: power while receiving and sending.
        train_watts: power while computing, that of the power mode.
        download, upload: bytes per second, a number or a :class:`Bandwidth`.
        availability: probability of being available in a round.
        source: where the values come from.
    """

    peak_flops_per_s: Real | None = Field(None, gt=0)
    effective_flops_per_s: Real = Field(gt=0)
    step_overhead_s: Real = Field(0.0, ge=0)
    memory_bytes: Real = Field(gt=0)
    idle_watts: Real = Field(ge=0)
    train_watts: Real = Field(ge=0)
    download: Link
    upload: Link
    availability: Real = Field(1.0, gt=0, le=1)
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _known_parts(cls, value: Any) -> Any:
        unknown = sorted(value.keys() - cls.model_fields.keys()) if isinstance(value, dict) else []
        if unknown:
            raise ValueError(
                f"{unknown[0]} is not a key of a device profile; known are "
                f"{', '.join(cls.model_fields)}"
            )
        return value

    @model_validator(mode="after")
    def _below_peak(self) -> "DeviceProfile":
        if self.peak_flops_per_s and self.effective_flops_per_s > self.peak_flops_per_s:
            raise ValueError("effective_flops_per_s is more than peak_flops_per_s")
        return self


class ClockConfig(Table):
    """The modelled clock: time and energy that the run would take on given devices."""

    profiles: TextList = Field(
        ("jetson_tx2", "jetson_xavier_nx", "jetson_agx_xavier"),
        description="device profiles, assigned to clients in equal shares by the seed; "
        "[device profiles](device_profiles.md) lists them",
    )
    custom: dict[str, DeviceProfile] = Field(
        {}, description="further device profiles, each a table `[clock.custom.NAME]`"
    )
    deadline_s: Real | None = Field(
        None, gt=0, description="modelled seconds after which an update is too late to be merged"
    )
    over_selection: Real = Field(
        1.0,
        ge=1,
        description="factor: this times `cohort_size` clients are drawn per round; updates of the "
        "first `cohort_size` by modelled time are merged",
    )

    @field_validator("profiles")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one profile")
        return value
