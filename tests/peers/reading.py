"""What the PPO tests read off the two sides."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional.rewards import process_scores, token_rewards
from tests.peers import cases

EARLY, MONTE_CARLO = "ppo-early", "ppo-early-monte-carlo"


def tensor(x: Any) -> Tensor:
    return torch.tensor(x)


def masked(theirs: dict[str, Any], name: str, mask: Tensor) -> Tensor:
    """A variable of their rollout, zero off our response mask."""
    return tensor(theirs["rollout"][name]).masked_fill(~mask, 0)


def tail(theirs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether a row has a slot after EOS, the column of its EOS, its score, and their value in the slot after EOS."""
    ended, column = (~mask).any(1), mask.sum(1) - 1
    slot = (column + 1).clamp(max=mask.shape[1] - 1)[:, None]
    values = tensor(theirs["rollout"]["values"]).gather(1, slot)[:, 0]
    return ended, column, tensor(theirs["rollout"]["scores"]), values


def processed_scores(rollout: dict[str, Tensor]) -> Tensor:
    """Our scores with the penalty for a missing EOS."""
    penalty = cases.MISSING_EOS_PENALTY
    return process_scores(rollout["scores"], rollout["truncated"], missing_eos_penalty=penalty, clip=None)


def our_rewards(rollout: dict[str, Tensor]) -> Tensor:
    """Our reward of each token."""
    inputs = rollout["logprobs"], rollout["ref_logprobs"], rollout["response_mask"]
    return token_rewards(processed_scores(rollout), *inputs, kl_coef=cases.KL_COEF)
