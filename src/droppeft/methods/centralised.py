"""Centralised: one client that holds everybody's rows; an upper reference, not a federated method.

A round takes as many steps as the cohort of the federated run would take together, at full depth,
with one optimizer for all of them. On the modelled clock it is the data-centre GPU. All ours.
"""

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.federated_method import Method, average_by_examples
from droppeft.methods.fedlora import FEDLORA


def _check(config: Config) -> None:
    if config.training.local_steps is None:
        raise DroppeftError(
            "method=centralised takes the steps of a whole cohort, which epochs do not tell; "
            "set training.local_steps"
        )


def _alone(config: Config) -> Config:
    """One client with all rows; the same again for what is alone already."""
    steps = config.training.local_steps or 0
    training = config.training.model_copy(update={"local_steps": steps * config.cohort_size})
    partition = config.partition.model_copy(update={"kind": "iid"})
    where = {"profiles": ("datacentre_gpu",), "over_selection": 1.0, "deadline_s": None}
    clock = config.clock.model_copy(update=where)
    alone = {"clients": 1, "cohort_size": 1, "quorum": 1}
    return config.model_copy(
        update={**alone, "training": training, "partition": partition, "clock": clock}
    )


CENTRALISED = Method(
    name="centralised",
    summary="one client that holds all rows: an upper reference",
    tables=frozenset({"frozen", "server"}),
    init=FEDLORA.init,
    instruct=FEDLORA.instruct,
    merge=average_by_examples,
    check=_check,
    adjust=_alone,
)
