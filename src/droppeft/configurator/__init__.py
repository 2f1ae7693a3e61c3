"""Which arm a device gets: rates over depth and a prefix, learnt while the run trains.

Source: a multi-armed bandit over dropout rates is DropPEFT's (arXiv:2503.10217); arms, rewards,
policies and the choice for a whole cohort are ours.
"""

from droppeft.configurator.arms import Arm, arm_rates, candidates, first_trained, neighbours
from droppeft.configurator.choosing import choose_together
from droppeft.configurator.learning import Estimate, Trial, estimate, per_second
from droppeft.configurator.policies import POLICIES, Asked, Scored, score

__all__ = [
    "POLICIES",
    "Arm",
    "Asked",
    "Estimate",
    "Scored",
    "Trial",
    "arm_rates",
    "candidates",
    "choose_together",
    "estimate",
    "first_trained",
    "neighbours",
    "per_second",
    "score",
]
