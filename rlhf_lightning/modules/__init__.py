"""The methods, one file each: LightningModules whose training_step reads like the paper."""

from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule

__all__ = ["DPOModule", "PPOModule", "RewardModelModule", "SFTModule"]
