"""Adaptive: each client trains what helps the model most in the time that it has. Ours.

No layer is dropped and all trained layers are shared. What differs between clients is how deep the
backward pass of their steps reaches (always the whole depth, a depth that changes from step to
step, or the last layers alone) and, for language models, how many of the local steps they take. In
every round, the server gives each client the combination with which the cohort gains most per
second of the round, which lasts as long as its slowest client; a client never gets what its memory
cannot hold.

For classification the lower half of the layers is frozen on all clients, and a client trains all or
two thirds of the upper layers; what these are worth is learnt from the rewards of whole local
trainings (docs/benchmarks/ablation.md). Language models need their lower layers more, so that
all layers have an adapter. What a combination is worth is then the sum of what its layers are
worth, and the updates of every round tell that (:mod:`droppeft.bandit.layer_values`). A round is
worth at least 85 % of one in which all clients do all. At first all layers are worth the
same. At least two clients of a round train all layers, so that none is left as it is.

Two defaults lower the costs without choosing anything. Values travel in 8 bits, with error feedback
(``traffic.encoding=int8``). Steps of language models add up the gradients of parts of four rows
(``training.micro_batch_size=4``), which store half of the activations of a batch of eight.
"""

from dataclasses import replace

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.methods.droppeft import DROPPEFT


def _check(config: Config) -> None:
    """Refuse settings that make it another method.

    Raises:
        DroppeftError: if there is no bandit, or if its arms may drop layers.
    """
    settings = config.configurator
    if settings.policy == "fixed":
        raise DroppeftError(
            "method=adaptive needs a configurator; leave configurator.policy=fixed out, or set "
            "method=fedlora"
        )
    if any(settings.means):
        raise DroppeftError(
            "method=adaptive drops no layers; leave configurator.means out, or set method=droppeft"
        )


ADAPTIVE = replace(
    DROPPEFT,
    name="adaptive",
    summary="as many layers (and for language models, steps) as suit each kind of device",
    tables=frozenset({"configurator", "frozen", "server"}),
    check=_check,
    has_global_model=lambda config: True,
    sent=None,
)
