"""RLHF as a PyTorch-Lightning template: SFT, reward models, PPO and DPO on one machine or many."""

import os

# Before torch loads OpenMP: threads that wait without spinning. On a machine that does something else as well, spinning
# made training more than twice as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
