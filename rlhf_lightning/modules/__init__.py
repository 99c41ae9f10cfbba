"""The methods, one file each: LightningModules whose training_step reads like the paper."""

from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.grpo import GRPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.online_dpo import OnlineDPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.process_reward import ProcessRewardModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule

__all__ = [
    "DPOModule",
    "GRPOModule",
    "KTOModule",
    "OnlineDPOModule",
    "PPOModule",
    "ProcessRewardModule",
    "RewardModelModule",
    "SFTModule",
]
