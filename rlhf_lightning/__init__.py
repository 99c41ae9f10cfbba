"""RLHF as a PyTorch-Lightning template: SFT, reward models, PPO and DPO on one machine or many."""

__version__ = "0.1.0"
