"""What GRPO and its relatives log of an iteration, under the names that TRL's users know."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional.groups import group_sizes, group_std, without_signal
from rlhf_lightning.functional.kl import kl_k3
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.modules.metrics import Means
from rlhf_lightning.rollouts import mismatch
from rlhf_lightning.rollouts.buffer import Rollout

UPDATE = (
    "policy_loss", "kl_loss", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
    "policy/approxkl_avg", "val/ratio", "staleness", "grad_norm", *mismatch.MEANS, *mismatch.LOWEST, *mismatch.HIGHEST,
)  # fmt: skip


def update_means() -> Means:
    """What an iteration's optimizer steps count: means over tokens that count, all ranks together."""
    return Means(UPDATE, lowest=mismatch.LOWEST, highest=mismatch.HIGHEST)


def group_means(
    rollout: Rollout, judged: Tensor, all_sum: Callable[[Tensor], Tensor], *, reference: bool
) -> dict[str, Tensor]:
    """Means over the responses of an iteration, all ranks together.

    Args:
        rollout: The iteration's responses.
        judged: The scores that advantages are made of. Shape (batch,).
        all_sum: Sums a tensor over ranks.
        reference: Whether there is one; without, nothing is said of the KL.

    Returns:
        Scalars by name. ``reward_std``: mean of the groups' own deviations, of the raw scores. ``frac_reward_zero_std``: share
        of responses in groups that agree in the ``judged`` ones, which teach nothing. ``kl``: k3 a *token*, as TRL logs it;
        ``objective/kl``: nats a *response* (k1), as PPO logs it; so is ``objective/entropy``. ``episodes``: how many responses.
    """
    mask, scores, log_ratio = rollout.response_mask, rollout.scores, rollout.logprobs - rollout.ref_logprobs
    alike = without_signal(judged, rollout.groups).float()
    spread = group_std(scores, rollout.groups) if bool((group_sizes(rollout.groups) > 1).all()) else 0 * scores
    ended = (~rollout.truncated).float()
    lengths = mask.sum(dim=1).float()
    sums = {
        "reward": scores,
        "reward_std": spread,
        "frac_reward_zero_std": alike,
        "completions/mean_length": lengths,
        "completions/clipped_ratio": rollout.truncated.float(),
        "completions/mean_terminated_length": lengths * ended,
        "objective/entropy": masked_sum(rollout.entropy, mask, dim=1),
        "ended": ended,
    }
    if reference:
        sums["objective/kl"] = masked_sum(log_ratio, mask, dim=1)
        sums["kl"] = masked_sum(kl_k3(log_ratio), mask, dim=1)
    stacked = torch.stack([x.sum().float() for x in sums.values()])
    count = all_sum(torch.tensor(float(len(rollout)), dtype=torch.float32, device=stacked.device))
    totals = dict(zip(sums, all_sum(stacked), strict=True))
    tokens, finished = totals["completions/mean_length"], totals.pop("ended")
    means = {name: total / count for name, total in totals.items()}
    means["completions/mean_terminated_length"] = totals["completions/mean_terminated_length"] / finished.clamp(min=1)
    if reference:
        means["kl"] = totals["kl"] / tokens
    return {**means, "episodes": count}


def length_extremes(rollout: Rollout, module: Any) -> dict[str, float]:
    """Shortest and longest response of the iteration over all ranks, and of those that ended (0 where none did)."""
    lengths, ended = rollout.response_mask.sum(dim=1).float(), ~rollout.truncated
    nothing = torch.full_like(lengths[:1], -torch.inf)  # below whatever another rank has
    shortest, longest = (torch.cat([nothing, x[ended]]).max() for x in (-lengths, lengths))
    found = torch.stack([-lengths.min(), lengths.max(), shortest, longest])
    if module.trainer.world_size > 1:
        found = module.trainer.strategy.reduce(found, reduce_op="max")
    names = ("min_length", "max_length", "min_terminated_length", "max_terminated_length")
    known = zip(names, found.tolist(), strict=True)
    return {f"completions/{name}": abs(x) if math.isfinite(x) else 0.0 for name, x in known}
