"""What YAML names as a loss: a formula of ``functional/`` and its coefficients, as a frozen dataclass.

A user's own loss is a subclass in the user's own file, given to the module by its ``class_path``.
"""

from rlhf_lightning.losses.divergences import AlphaDivergence, Divergence, ForwardKL, JensenShannon
from rlhf_lightning.losses.dpo import (
    AOTLoss,
    DPOLoss,
    EXOLoss,
    FDPOLoss,
    HingeLoss,
    IPOLoss,
    LDDPOLoss,
    NormalisedDPOLoss,
    RobustDPOLoss,
)
from rlhf_lightning.losses.implicit_rewards import APODownLoss, APOZeroLoss, BCOPairLoss, NCALoss, SPPOHardLoss
from rlhf_lightning.losses.mixed import MixedLoss, WPOLoss
from rlhf_lightning.losses.pairs import BetaLoss, Needs, PairLoss, Pairs, ScoredResponses
from rlhf_lightning.losses.policy import (
    CISPOLoss,
    ClippedLoss,
    PolicyLoss,
    PolicyObjective,
    ReinforceLoss,
    SequenceClippedLoss,
)
from rlhf_lightning.losses.ppo import PPOLoss
from rlhf_lightning.losses.process import StepBCELoss, StepLoss
from rlhf_lightning.losses.ranking import (
    BradleyTerryLoss,
    LabelledLoss,
    ListLoss,
    OutcomeLoss,
    PlackettLuceLoss,
    RankingLoss,
)
from rlhf_lightning.losses.reference_free import CPOLoss, NLLLoss, ORPOLoss, SimPOLoss
from rlhf_lightning.losses.unpaired import APOZeroUnpairedLoss, BCOUnpairedLoss, KTOLoss, UnpairedLoss

__all__ = [
    "AOTLoss",
    "APODownLoss",
    "APOZeroLoss",
    "APOZeroUnpairedLoss",
    "AlphaDivergence",
    "BCOPairLoss",
    "BCOUnpairedLoss",
    "BetaLoss",
    "BradleyTerryLoss",
    "CISPOLoss",
    "CPOLoss",
    "ClippedLoss",
    "DPOLoss",
    "Divergence",
    "EXOLoss",
    "FDPOLoss",
    "ForwardKL",
    "HingeLoss",
    "IPOLoss",
    "JensenShannon",
    "KTOLoss",
    "LDDPOLoss",
    "LabelledLoss",
    "ListLoss",
    "MixedLoss",
    "NCALoss",
    "NLLLoss",
    "Needs",
    "NormalisedDPOLoss",
    "ORPOLoss",
    "OutcomeLoss",
    "PPOLoss",
    "PairLoss",
    "Pairs",
    "PlackettLuceLoss",
    "PolicyLoss",
    "PolicyObjective",
    "RankingLoss",
    "ReinforceLoss",
    "RobustDPOLoss",
    "SPPOHardLoss",
    "ScoredResponses",
    "SequenceClippedLoss",
    "SimPOLoss",
    "StepBCELoss",
    "StepLoss",
    "UnpairedLoss",
    "WPOLoss",
]
