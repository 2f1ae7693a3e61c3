"""The configurator's table: which arms there are, and how they are chosen."""

from typing import Annotated, Literal

from pydantic import Field

from droppeft.config.table import Real, Table

Fraction = Annotated[Real, Field(ge=0, lt=1)]


class ConfiguratorConfig(Table):
    """Drop rates and untrained layers, chosen by a multi-armed bandit during the run.

    With `policy=fixed` there is no configurator, and the rates are those of `dropout`. With any
    other policy, `dropout.mean`, `count`, `rates` and `schedule` are not used, and the other
    settings of `dropout` hold for all arms.
    """

    policy: Literal[
        "fixed", "uniform_random", "epsilon_greedy", "sliding_window_ucb", "budgeted_thompson"
    ] = Field("fixed", description="how arms are chosen; `fixed`: no arms, the rates of `dropout`")
    means: tuple[Fraction, ...] = Field(
        (0.0, 0.25, 0.5),
        min_length=1,
        description="drop rates of the arms, mean over the trained layers; rates that protected "
        "layers make impossible are left out",
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
