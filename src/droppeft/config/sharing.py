"""The sharing table: which layers a client shares, and how shared ones are merged."""

from typing import Literal

from pydantic import Field

from droppeft.config.table import Real, Table, Whole


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
        "gradient_snr",
        "weight_change",
        "block_influence",
        "cka",
        "leave_one_out",
        "random",
        "position",
    ] = Field("gradient_norm", description="how layers are scored; [criteria](layer_criteria.md)")
    score_rows: Whole = Field(
        32, ge=2, description="validation rows for criteria that run the model to compute scores"
    )
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
    weights: Literal["examples", "active_steps"] = Field(
        "examples",
        description="weight of a client's layer in the mean: the client's rows, or its rows times "
        "the steps in which the layer ran",
    )
    mean: Literal["holders", "everyone"] = Field(
        "holders",
        description="`holders`: a layer becomes the mean over the clients that sent it; "
        "`everyone` (a control): the others count as if they had sent the server's layer",
    )
    factors: Literal["separate", "product"] = Field(
        "separate",
        description="average LoRA's A and B separately, or their products, which are then "
        "truncated to the rank",
    )
