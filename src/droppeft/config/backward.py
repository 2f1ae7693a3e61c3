"""The backward table: how deep the backward pass of a step reaches."""

from typing import Annotated

from pydantic import Field

from droppeft.config.table import Real, Table


class BackwardConfig(Table):
    """How deep the backward pass of a step reaches; used by the method `droppeft`."""

    depths: tuple[Annotated[Real, Field(gt=0, le=1)], ...] = Field(
        (1.0,),
        min_length=1,
        description="fractions of the layers above `frozen.layers`, counted from the last, that a "
        "step trains; each step draws one of them, each with the same probability. The layers "
        "below run forward only, so that nothing is stored for them",
    )
