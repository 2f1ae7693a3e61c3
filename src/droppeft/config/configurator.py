"""The configurator's table: which arms there are, and how they are chosen."""

from typing import Annotated, Literal

from pydantic import Field

from droppeft.config.table import Real, Table, Whole

Share = Annotated[Real, Field(ge=0, lt=1)]
Shape = Literal["uniform", "incremental", "decay", "normal", "importance"]


class ConfiguratorConfig(Table):
    """What a client drops and trains is found out while the run trains.

    With `policy=fixed` there is no configurator, and the rates are those of `dropout`. With another
    `dropout.mean`, `count`, `rates` and `shape` are not used; its other settings hold for all arms.
    """

    policy: Literal[
        "fixed",
        "uniform_random",
        "epsilon_greedy",
        "sliding_window_ucb",
        "budgeted_thompson",
        "successive_halving",
    ] = Field("fixed", description="how arms are chosen; `fixed`: the rates of `dropout`")
    means: tuple[Share, ...] = Field(
        (0.0, 0.25, 0.5),
        min_length=1,
        description="drop rates of the candidates, mean over the layers that are trained; what "
        "the protected layers make impossible is left out",
    )
    shapes: tuple[Shape, ...] = Field(
        ("uniform",),
        min_length=1,
        description="their shapes over depth; `importance`: drop most what matters least, by the "
        "gradient norms of the run",
    )
    untrained: tuple[Share, ...] = Field(
        (0.0, 0.5),
        min_length=1,
        description="share of the layers behind `frozen.layers`, from the first, that run and are "
        "not trained",
    )
    reward: Literal["loss", "agreement"] = Field(
        "agreement",
        description="what a turn is worth: `agreement`: how far it moves the adapter where the "
        "round's other turns move it, which no client has to measure; `loss`: what it takes off "
        "the loss on the client's validation rows",
    )
    reward_rows: Whole = Field(
        16, ge=1, description="validation rows on which a client measures a `loss`"
    )
    window: Whole = Field(20, ge=1, description="rounds after which a reward is forgotten")
    epsilon: Real = Field(
        0.2, ge=0, le=1, description="of `epsilon_greedy`: part of the turns that explore"
    )
    stage: Whole = Field(
        3, ge=1, description="of `successive_halving`: rounds until the worse half goes"
    )
    refresh: Whole = Field(
        0,
        ge=0,
        description="rounds after which the worst arm makes room for a neighbour of the best; 0: "
        "never; of the policies that learn, but for `successive_halving`",
    )
    by_profile: bool = Field(
        True,
        description="what an arm takes is that of the kind of client, so that a cohort finishes "
        "together; otherwise clients are taken as alike",
    )
