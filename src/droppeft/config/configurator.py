"""The configurator's table: which arms there are, and how they are chosen."""

from typing import Annotated, Literal

from pydantic import Field

from droppeft.config.table import Real, Table

Fraction = Annotated[Real, Field(ge=0, lt=1)]
Share = Annotated[Real, Field(gt=0, le=1)]


class ConfiguratorConfig(Table):
    """What a client drops and trains, and in how many steps, chosen by a bandit during the run.

    With `policy=fixed` there is no configurator, and the rates are those of `dropout`. With any
    other policy, `dropout.mean`, `count`, `rates` and `schedule` are not used, and the other
    settings of `dropout` hold for all arms.
    """

    policy: Literal[
        "fixed",
        "uniform_random",
        "epsilon_greedy",
        "sliding_window_ucb",
        "budgeted_thompson",
        "layer_values",
    ] = Field(
        "fixed",
        description="how arms are chosen; `fixed`: no arms, the rates of `dropout`; "
        "`layer_values`: by what each layer is worth, which the updates of every round tell, so "
        "that no arm has to be tried (only for arms that drop no layers)",
    )
    means: tuple[Fraction, ...] = Field(
        (0.0, 0.25, 0.5),
        min_length=1,
        description="drop rates of the arms, mean over the trained layers; rates that protected "
        "layers make impossible are left out",
    )
    depths: tuple[Annotated[tuple[Share, ...], Field(min_length=1)], ...] = Field(
        ((1.0,), (0.5,)),
        min_length=1,
        description="which layers the arms train; a list for each arm, as `backward.depths`",
    )
    steps: tuple[Share, ...] = Field(
        (1.0,), min_length=1, description="shares of `training.local_steps` that the arms take"
    )
    reward: Literal["loss", "agreement"] = Field(
        "agreement",
        description="reward of a local training: `agreement`: how far it moves the adapter in the "
        "direction of the round's other updates, computed on the server; `loss`: by how much it "
        "lowers the loss on the client's validation rows",
    )
