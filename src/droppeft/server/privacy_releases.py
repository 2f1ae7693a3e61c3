"""How many noisy models a differentially private run has released, and what it guarantees. Ours.

Each round releases one. A round that is repeated, because its checkpoint was lost, has released a
second one with other noise, and both count.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from droppeft.config import Config
from droppeft.errors import DroppeftError
from droppeft.quantities import counted
from droppeft.runs import checkpoints
from droppeft.runs.checkpoints import Checkpoint
from droppeft.runs.folder import ROUNDS
from droppeft.runs.read_ledger import read_rows
from droppeft.server.privacy_accountant import epsilon_spent

LOST = "lost_releases"
"""Name of the number of rounds without a checkpoint among the facts of a checkpoint."""


def releases(facts: Mapping[str, Any], round: int) -> int:
    """Return the number of models that were released up to a round.

    Args:
        facts: of a checkpoint of the run.
        round: the last one.
    """
    lost: int = facts.get(LOST, 0)
    return round + lost


def check_next_round(config: Config, facts: Mapping[str, Any], round: int, out: Path) -> None:
    """Check that one more round keeps a run within its budget, if it has one.

    It does not if rounds were repeated, for which the noise was not chosen.

    Args:
        config: of the run.
        facts: of its newest checkpoint.
        round: the one that comes next.
        out: folder of the run.

    Raises:
        DroppeftError: the round would spend more than ``privacy.epsilon``.
    """
    budget = config.privacy.epsilon
    if budget is None or not facts.get(LOST):
        return
    spent = epsilon_spent(config, releases(facts, round))
    if spent > budget:
        raise DroppeftError(
            f"round {round} would spend epsilon {spent:.3g}, which is more than privacy.epsilon="
            f"{budget:g}, because {counted(facts[LOST], 'round')} had to be repeated; the run ends "
            f"with round {round - 1}, whose model is written by: droppeft export {out}"
        )


def guarantee(config: Config, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a run guarantees after all its rounds; ``None`` without differential privacy.

    Args:
        config: of the run.
        facts: of its newest checkpoint.
    """
    if not config.privacy.is_on:
        return None
    count = releases(facts, config.rounds)
    return {
        "epsilon": epsilon_spent(config, count),
        "delta": config.privacy.delta,
        "noise_multiplier": config.privacy.noise_multiplier,
        "clip_norm": config.privacy.clip_norm,
        "sampling_probability": config.cohort_size / config.clients,
        "releases": count,
    }


def count_lost_releases(out: Path, newest: Checkpoint) -> Checkpoint:
    """Return the checkpoint from which a run is resumed, with all that was released counted.

    It is saved before the rows of rounds without a checkpoint are removed from the ledger, so that
    no release is forgotten, whenever the process is killed.

    Args:
        out: folder of the run.
        newest: the newest checkpoint that can be read.
    """
    lost = sum(row["round"] > newest.round for row in read_rows(out / ROUNDS))
    if lost == 0:
        return newest
    counted = replace(newest, facts={**newest.facts, LOST: newest.facts.get(LOST, 0) + lost})
    checkpoints.save(out / "checkpoints", counted, range(newest.round))
    return counted
