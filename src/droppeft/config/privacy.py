"""The privacy table: differential privacy of the clients."""

from pydantic import Field, model_validator

from droppeft.config.table import Real, Table


class PrivacyConfig(Table):
    """Client-level differential privacy: changes are clipped, and the server adds noise."""

    epsilon: Real | None = Field(
        None,
        gt=0,
        description="largest epsilon of all rounds; turns differential privacy on, with the "
        "noise that it takes. A round that a crash has lost counts too, and can exceed it: "
        "`result.json` has what was spent",
    )
    noise_multiplier: Real | None = Field(
        None,
        gt=0,
        description="standard deviation of the noise, as a multiple of `privacy.clip_norm`; turns "
        "differential privacy on (found from `privacy.epsilon` if not given; the run's config.toml "
        "has it)",
    )
    delta: Real | None = Field(
        None,
        gt=0,
        lt=1,
        description="probability with which epsilon may not hold; must be given, and be less than "
        "1/clients",
    )
    clip_norm: Real = Field(
        1.0, gt=0, description="largest norm of a client's change, over all tensors that it sends"
    )

    @property
    def is_on(self) -> bool:
        """Whether the run is differentially private."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @model_validator(mode="after")
    def _complete(self) -> "PrivacyConfig":
        if self.is_on and self.delta is None:
            raise ValueError(
                "epsilon and noise_multiplier need privacy.delta too; give a value well below "
                "1/clients"
            )
        return self
