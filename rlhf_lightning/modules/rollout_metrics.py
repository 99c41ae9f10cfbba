"""What an online method logs of its rollouts and validations, under the names that TRL's users know."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lightning.functional.kl import kl_k3
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.modules.metrics import Means
from rlhf_lightning.rollouts import mismatch
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.collect import Responses

UPDATE = (
    "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg",
    "loss/ptx_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_spread", "grad_norm",
    "grad_norm/policy", "grad_norm/critic",
    *mismatch.MEANS, *mismatch.LOWEST, *mismatch.HIGHEST,
)  # fmt: skip
MODES = ("sampled", "greedy")
EVALUATION = tuple(f"{mode}/{name}" for mode in MODES for name in ("score", "kl", "length", "truncated"))


def update_means() -> Means:
    """What an iteration's optimizer steps count."""
    return Means(UPDATE, lowest=mismatch.LOWEST, highest=mismatch.HIGHEST)


def rollout_means(rollout: Rollout, kl_coef: float, all_sum: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Means over the responses of an iteration, all ranks together.

    Sign: ``objective/non_score_reward`` is minus the KL penalty, and ``objective/rlhf_reward`` is score plus that.

    Args:
        rollout: The iteration's responses.
        kl_coef: Weight of the KL penalty.
        all_sum: Sums a tensor over ranks.

    Returns:
        Scalars by name. ``objective/kl`` and ``objective/entropy`` are sums over a response, in nats;
        ``objective/kl_k3`` estimates the same KL without ever being negative; ``episodes`` counts responses.
    """
    mask, log_ratio = rollout.response_mask, rollout.logprobs - rollout.ref_logprobs
    kl, scores = masked_sum(log_ratio, mask, dim=1), rollout.scores
    per_response = {
        "objective/kl": kl,
        "objective/kl_k3": masked_sum(kl_k3(log_ratio), mask, dim=1),
        "objective/entropy": masked_sum(rollout.entropy, mask, dim=1),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "objective/scores": scores,
        "objective/length": mask.sum(dim=1).float(),
        "objective/truncated": rollout.truncated.float(),
        "val/num_eos_tokens": (~rollout.truncated).float(),
    }
    stacked = torch.stack([x.sum().float() for x in per_response.values()])
    count = all_sum(torch.tensor(float(len(rollout)), dtype=torch.float32, device=stacked.device))
    means = dict(zip(per_response, all_sum(stacked) / count, strict=True))
    # Around the mean: of scores near 1000, float32 squares leave deviations below .2 no digit.
    variance = all_sum((scores - means["objective/scores"]).square().sum()) / count
    return {**means, "objective/scores_std": variance.sqrt(), "episodes": count}


def part_means(
    parts: dict[str, Tensor], all_sum: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Means of the parts of a weighted reward over the samples that it applies to, all ranks together.

    Args:
        parts: Scores of one reward each, by name; NaN where it does not apply. Its mean is NaN where it applies nowhere.
        all_sum: Sums a tensor over ranks.
        device: Where that is done.
    """
    means = {}
    for name, scores in parts.items():
        applies = ~scores.isnan()
        counted = torch.stack([scores[applies].sum(), applies.sum()]).to(device, torch.float32)
        total, count = all_sum(counted).tolist()
        means[f"rewards/{name}/mean"] = torch.tensor(total / count if count else float("nan"), dtype=torch.float32)
    return means


def update_metrics(means: Means) -> dict[str, Tensor]:
    """The means over an iteration's optimizer steps, with the variance of the ratio, and forget them."""
    values = means.drain()
    # Around 1, where float32 has steps of 1e-7: a difference of squares would lose variances below that.
    values["val/ratio_var"] = values.pop("val/ratio_spread") - (values["val/ratio"] - 1).square()
    return values


def evaluation_counts(
    mode: str, responses: Responses, scores: Tensor, log_ratio: Tensor | None
) -> dict[str, tuple[Tensor, Tensor | int]]:
    """Sums and counts of one validation batch.

    Args:
        mode: "sampled" or "greedy". The KL of greedy responses is that of their tokens, not a divergence.
        responses: The answers to the fixed prompts.
        scores: Shape (batch,).
        log_ratio: log policy - log reference, aligned with ``input_ids[:, 1:]``, zero off the response; None without a
            reference, and nothing is said of the KL.
    """
    rows = len(scores)
    kl: dict[str, tuple[Tensor, Tensor | int]] = {} if log_ratio is None else {f"{mode}/kl": (log_ratio.sum(), rows)}
    return kl | {
        f"{mode}/score": (scores.sum(), rows),
        f"{mode}/length": (responses.response_mask.sum(), rows),
        f"{mode}/truncated": (responses.truncated.sum(), rows),
    }
