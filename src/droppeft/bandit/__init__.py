"""A multi-armed bandit that chooses what clients drop, train, and in how many steps, in a run.

Source: DropPEFT (arXiv:2503.10217) chooses drop rates by a multi-armed bandit. Ours: the arms, the
rewards, the choice for a whole cohort, and the policies (``policies.py`` names what they follow).
"""

from droppeft.bandit.arms import Arm, arm_rates, candidates, first_trained
from droppeft.bandit.choosing import choose_together
from droppeft.bandit.learning import Estimate, Observation, estimate, per_second
from droppeft.bandit.policies import POLICIES, PolicyInputs, ScoredArms, score

__all__ = [
    "POLICIES",
    "Arm",
    "Estimate",
    "Observation",
    "PolicyInputs",
    "ScoredArms",
    "arm_rates",
    "candidates",
    "choose_together",
    "estimate",
    "first_trained",
    "per_second",
    "score",
]
