"""The sharing table: which layers a client shares, and how shared ones are merged."""

from typing import Literal

from pydantic import Field

from droppeft.config.table import Real, Table, Whole


class SharingConfig(Table):
    """Personalised layer sharing: a client keeps the layers that matter most to it."""

    fraction: Real = Field(
        1.0,
        ge=0,
        le=1,
        description="part of the layers that a client shares, rounded to whole layers; the others, "
        "which score highest, stay with it",
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
    ] = Field(
        "gradient_norm", description="how layers are scored; [sharing.md](sharing.md) lists them"
    )
    score_rows: Whole = Field(
        32, ge=2, description="validation rows, for criteria that run the model to score"
    )
    hysteresis: Real = Field(
        0.1,
        ge=0,
        description="by what part a shared layer must score higher than a kept one to take its "
        "place",
    )
    head: Literal["shared", "personal"] = Field(
        "shared",
        description="`personal`: the head never travels; there is no global accuracy then",
    )
    weights: Literal["examples", "active_steps"] = Field(
        "examples",
        description="what a client's layer counts in the mean: its rows, or its rows times the "
        "steps that the layer ran in",
    )
    mean: Literal["holders", "everyone"] = Field(
        "holders",
        description="a layer becomes the mean over the clients that sent it; `everyone`, a "
        "control: the others count as if they had sent back the server's",
    )
    factors: Literal["separate", "product"] = Field(
        "separate",
        description="LoRA's A and B are averaged by themselves, or their products, cut to the rank "
        "again",
    )
