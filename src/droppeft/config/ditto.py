"""The ditto table: settings of the method of that name."""

from pydantic import Field

from droppeft.config.table import Real, Table


class DittoConfig(Table):
    """Settings of `ditto`, where each client also trains a personal adapter."""

    pull: Real = Field(
        0.1,
        ge=0,
        description="weight of (pull/2)·‖personal − received‖² in the personal adapter's loss",
    )
