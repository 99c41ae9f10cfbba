"""What YAML names as a loss: a formula of ``functional/`` and its coefficients, as a frozen dataclass.

A user's own loss is a subclass in the user's own file, given to the module by its ``class_path``.
"""

from rlhf_lightning.losses.pairs import DPOLoss, IPOLoss, PairLoss
from rlhf_lightning.losses.ppo import PPOLoss
from rlhf_lightning.losses.ranking import BradleyTerryLoss, RankingLoss

__all__ = ["BradleyTerryLoss", "DPOLoss", "IPOLoss", "PPOLoss", "PairLoss", "RankingLoss"]
