"""Centralised: one client that holds all rows; an upper reference, not a federated method. Ours.

In a round this client takes as many steps as all clients of a cohort together would take, at full
depth and with a single optimizer. Its device profile is the data-centre GPU.
"""

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import Method, average_by_targets
from droppeft.methods.fedlora import FEDLORA


def _check(config: Config) -> None:
    if config.training.local_steps is None:
        raise DroppeftError(
            "method=centralised takes the steps of a whole cohort, and training.local_epochs does "
            "not say how many they are; set training.local_steps instead"
        )
    if config.partition.kind == "sites":
        raise DroppeftError(
            "method=centralised needs all rows in one place, and with partition.kind=sites they "
            "stay at the sites; use another method"
        )


def _one_client(config: Config) -> Config:
    """The same run with one client that has all rows; idempotent."""
    steps = config.training.local_steps or 0
    training = config.training.model_copy(update={"local_steps": steps * config.cohort_size})
    partition = config.partition.model_copy(update={"kind": "iid", "small": "merge"})
    changed_clock = {"profiles": ("datacentre_gpu",), "over_selection": 1.0, "deadline_s": None}
    clock = config.clock.model_copy(update=changed_clock)
    sizes = {"clients": 1, "cohort_size": 1, "quorum": 1}
    return config.model_copy(
        update={**sizes, "training": training, "partition": partition, "clock": clock}
    )


CENTRALISED = Method(
    name="centralised",
    summary="one client that holds all rows: an upper reference",
    tables=frozenset({"frozen", "server"}),
    init=FEDLORA.init,
    instruct=FEDLORA.instruct,
    merge=average_by_targets,
    check=_check,
    adjust=_one_client,
)
