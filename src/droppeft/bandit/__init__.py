"""Which arm a client gets: rates over depth and a prefix, learnt while the run trains.

Source: a multi-armed bandit over dropout rates is DropPEFT's (arXiv:2503.10217); arms, rewards,
policies and the choice for a whole cohort are ours.
"""

from droppeft.bandit.arms import Arm, arm_rates, candidates, first_trained, neighbours
from droppeft.bandit.choosing import choose_together
from droppeft.bandit.learning import Estimate, Observation, estimate, per_second
from droppeft.bandit.policies import POLICIES, Asked, ScoredArms, score

__all__ = [
    "POLICIES",
    "Arm",
    "Asked",
    "Estimate",
    "Observation",
    "ScoredArms",
    "arm_rates",
    "candidates",
    "choose_together",
    "estimate",
    "first_trained",
    "neighbours",
    "per_second",
    "score",
]
