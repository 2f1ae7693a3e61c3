"""The clients that a run stands for, on the modelled clock: profiles, deadline, over-selection."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from droppeft.config.table import Real, Table, WordList


class Bandwidth(Table):
    """Bytes per second of a link; in each round a normal draw, cut off at both ends.

    Attributes:
        mean, deviation: of the normal distribution.
        least, most: what a draw is raised or lowered to.
    """

    mean: Real = Field(gt=0)
    deviation: Real = Field(0.0, ge=0)
    least: Real | None = Field(None, gt=0)
    most: Real | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _cut_off(self) -> "Bandwidth":
        if self.deviation and (self.least is None or self.most is None):
            raise ValueError("a bandwidth with a deviation needs least and most")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError("least is more than most")
        return self


def _fixed_or_drawn(value: object) -> object:
    """Let a bandwidth that never changes be written as a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"mean": value} if is_number else value


Link = Annotated[Bandwidth, BeforeValidator(_fixed_or_drawn)]


class DeviceProfile(Table):
    """A kind of client, as far as the modelled clock needs to know it.

    Attributes:
        peak_flops_per_s: of the data sheet; only shown.
        effective_flops_per_s: what training reaches.
        step_overhead_s: of every optimizer step, whatever it computes.
        memory_bytes: that a training process can have.
        idle_watts: while it loads and sends.
        train_watts: while it computes; that of its power mode.
        download, upload: bytes per second, a number or a :class:`Bandwidth`.
        availability: probability that it is there in a round.
        source: where the figures come from.
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
                f"{unknown[0]} is no part of a profile, which has {', '.join(cls.model_fields)}"
            )
        return value

    @model_validator(mode="after")
    def _below_peak(self) -> "DeviceProfile":
        if self.peak_flops_per_s and self.effective_flops_per_s > self.peak_flops_per_s:
            raise ValueError("effective_flops_per_s is more than peak_flops_per_s")
        return self


class ClockConfig(Table):
    """The modelled clock: what the run would take on clients that are not here."""

    profiles: WordList = Field(
        ("jetson_tx2", "jetson_xavier_nx", "jetson_agx_xavier"),
        description="profiles of the clients, in equal shares, by the seed; "
        "[device_profiles.md](device_profiles.md) lists them",
    )
    custom: dict[str, DeviceProfile] = Field(
        {}, description="further profiles, each a table `[clock.custom.NAME]`"
    )
    deadline_s: Real | None = Field(
        None, gt=0, description="modelled seconds after which a turn is too late to be merged"
    )
    over_selection: Real = Field(
        1.0,
        ge=1,
        description="clients drawn per round are cohort times this; the first cohort of them by "
        "modelled time are merged",
    )

    @field_validator("profiles")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("names no profile")
        return value
