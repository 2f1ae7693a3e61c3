"""The flower table: the transport over Flower."""

from pydantic import Field

from droppeft.config.table import Real, Table


class FlowerConfig(Table):
    """Flower, in its simulation and on a SuperLink."""

    deadline_s: Real = Field(
        3600.0, gt=0, description="seconds after which a round no longer waits for replies"
    )
    nodes_timeout_s: Real = Field(
        120.0, gt=0, description="seconds that the start of a run waits for its clients' nodes"
    )
    model_server: bool = Field(
        True,
        description="on a SuperNode: a separate process holds the model between messages",
    )
    client_keys: str | None = Field(
        None,
        description="on a SuperLink: the folder of the clients' public keys (`droppeft keys`); a "
        "node must have the key of the client that it says it is",
    )
