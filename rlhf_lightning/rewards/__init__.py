"""Rewards: what a response is worth, as objects that YAML names."""

from rlhf_lightning.rewards.code import CodeReward
from rlhf_lightning.rewards.composite import WeightedRewards
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.maths import FinalAnswerReward, MathReward
from rlhf_lightning.rewards.reasoning import ReasoningGymReward, ReasoningGymSource
from rlhf_lightning.rewards.rules import (
    FormatReward,
    JSONSchemaReward,
    LengthReward,
    OverlongPenalty,
    RepetitionPenalty,
)

__all__ = [
    "CodeReward",
    "FinalAnswerReward",
    "FormatReward",
    "FunctionReward",
    "JSONSchemaReward",
    "LengthReward",
    "MathReward",
    "OverlongPenalty",
    "ReasoningGymReward",
    "ReasoningGymSource",
    "RepetitionPenalty",
    "WeightedRewards",
]
