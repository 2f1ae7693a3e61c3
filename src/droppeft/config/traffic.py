"""The traffic table: how tensors travel between server and clients."""

from typing import Literal

from pydantic import Field

from droppeft.config.table import Table


class TrafficConfig(Table):
    """How tensors travel."""

    encoding: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="`bf16`: two bytes for each value, in both directions; `int8`: about one; what "
        "rounding loses is added to the next message (error feedback)",
    )
