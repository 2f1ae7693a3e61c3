"""The sharing table: which layers a client shares."""

from typing import Literal

from pydantic import Field

from droppeft.config.table import Real, Table


class SharingConfig(Table):
    """Personalised layer sharing: the layers that score highest on a client are personal."""

    fraction: Real = Field(
        1.0,
        ge=0,
        le=1,
        description="fraction of its layers that a client shares, rounded to whole layers; the "
        "others, which score highest, are personal",
    )
    criterion: Literal[
        "gradient_norm",
        "relative_gradient_norm",
        "fisher",
        "block_influence",
        "cka",
        "leave_one_out",
        "random",
        "position",
    ] = Field("gradient_norm", description="how layers are scored; [criteria](layer_criteria.md)")
    hysteresis: Real = Field(
        0.1,
        ge=0,
        description="by what fraction a shared layer must score higher than a personal one to "
        "become personal in its place",
    )
    head: Literal["shared", "personal"] = Field(
        "shared",
        description="`personal`: the head is never sent; there is no global accuracy then",
    )
