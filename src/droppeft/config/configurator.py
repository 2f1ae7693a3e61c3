"""The configurator's table: which arms there are, and how they are chosen."""

from typing import Annotated, Literal

from pydantic import Field

from droppeft.config.table import Real, Table, Whole

Fraction = Annotated[Real, Field(ge=0, lt=1)]
Shape = Literal["uniform", "incremental", "decay", "normal", "importance"]


class ConfiguratorConfig(Table):
    """Drop rates and untrained layers, chosen by a multi-armed bandit during the run.

    With `policy=fixed` there is no configurator, and the rates are those of `dropout`. With any
    other policy, `dropout.mean`, `count`, `rates` and `shape` are not used, and the other settings
    of `dropout` hold for all arms.
    """

    policy: Literal[
        "fixed",
        "uniform_random",
        "epsilon_greedy",
        "sliding_window_ucb",
        "budgeted_thompson",
        "successive_halving",
    ] = Field("fixed", description="how arms are chosen; `fixed`: no arms, the rates of `dropout`")
    means: tuple[Fraction, ...] = Field(
        (0.0, 0.25, 0.5),
        min_length=1,
        description="drop rates of the arms, mean over the trained layers; rates that protected "
        "layers make impossible are left out",
    )
    shapes: tuple[Shape, ...] = Field(
        ("uniform",),
        min_length=1,
        description="how the arms' rates vary with depth; `importance`: layers with smaller "
        "gradient norms in the run are dropped more often",
    )
    untrained: tuple[Fraction, ...] = Field(
        (0.0, 0.5),
        min_length=1,
        description="fraction of the layers above `frozen.layers` that run but are not trained, "
        "counted from the first",
    )
    reward: Literal["loss", "agreement"] = Field(
        "agreement",
        description="reward of a local training: `agreement`: how far it moves the adapter in the "
        "direction of the round's other updates, computed on the server; `loss`: by how much it "
        "lowers the loss on the client's validation rows",
    )
    reward_rows: Whole = Field(
        16, ge=1, description="validation rows per client for the reward `loss`"
    )
    window: Whole = Field(20, ge=1, description="rounds after which a reward is forgotten")
    epsilon: Real = Field(
        0.2, ge=0, le=1, description="for `epsilon_greedy`: share of local trainings that explore"
    )
    stage: Whole = Field(
        3,
        ge=1,
        description="for `successive_halving`: rounds after which the worse half is discarded",
    )
    refresh: Whole = Field(
        0,
        ge=0,
        description="rounds after which the worst arm is replaced by a neighbour of the best, 0: "
        "never; for the policies that learn, except `successive_halving`",
    )
    by_profile: bool = Field(
        True,
        description="estimate an arm's time for each device profile, so that a cohort finishes "
        "at about the same time; otherwise all clients are treated alike",
    )
