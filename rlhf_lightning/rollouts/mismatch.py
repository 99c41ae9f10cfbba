"""An engine whose numbers are not the policy's: how far apart the two are, and the correction for it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.policy import Correction, importance_weights
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.rollouts.buffer import Rollout

Counted = dict[str, tuple[Tensor, Tensor | int]]

MEANS = ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean")
LOWEST = ("sampling/importance_sampling_ratio/min",)
TOLERANCE = 0.01  # nats; float32 gives 1e-5
HIGHEST = ("sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/max")


@dataclass(frozen=True)
class Importance:
    """How an engine with numbers of its own is corrected for: :func:`rlhf_lightning.functional.policy.importance_weights`.

    Attributes:
        cap: Greatest importance weight.
        how: What becomes of a greater one, and whether weights are those of tokens or of whole responses.
    """

    cap: float = 2.0
    how: Correction = "token_truncate"

    def __post_init__(self) -> None:
        """Refuse a bound that leaves nothing."""
        if not self.cap > 0:
            raise UserError(f"importance.cap must be positive, not {self.cap}")


def weighed(rollout: Rollout, drawn: Generation, importance: Importance) -> tuple[Rollout, Counted]:
    """The rollout with its advantages times the importance weights of its tokens.

    Args:
        rollout: With advantages, and with the policy's own log-probabilities.
        drawn: What the engine gave, log-probabilities among it.
        importance: Which weights.

    Returns:
        The rollout, and sums and counts by TRL's names.

    Raises:
        UserError: If the engine gave no log-probabilities.
    """
    if drawn.logprobs is None:
        raise UserError(
            "an engine whose numbers are not the policy's has to give the log-probabilities that it drew with"
        )
    mask = rollout.response_mask
    weights = importance_weights(rollout.logprobs, drawn.logprobs, mask, cap=importance.cap, how=importance.how)
    ratio = weights[mask]
    counted: Counted = {
        "sampling/importance_sampling_ratio/min": (ratio.min(), 1),
        "sampling/importance_sampling_ratio/mean": (ratio.sum(), len(ratio)),
        "sampling/importance_sampling_ratio/max": (ratio.max(), 1),
    }
    counted |= differences(rollout.logprobs, drawn.logprobs, mask)
    return replace(rollout, advantages=rollout.advantages * weights), counted


def differences(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Counted:
    """How far the log-probabilities are apart, as sums and counts. Shapes (batch, length); nats."""
    apart = (logprobs.detach() - sampler_logprobs)[mask].abs()
    return {
        "sampling/sampling_logp_difference/mean": (apart.sum(), len(apart)),
        "sampling/sampling_logp_difference/max": (apart.max(), 1),
    }


def refuse_other_numbers(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, precision: str) -> None:
    """Make sure that an engine that is said to compute as the policy does, does.

    Half precision rounds differently in every batch, by more than a bound could tell from a fault: it is only measured.

    Args:
        logprobs: Of the policy, with the weights that sampled. Shape (batch, length), nats.
        sampler_logprobs: Of the engine. Same shape.
        mask: True on response tokens. Same shape, bool.
        precision: As Lightning calls it.

    Raises:
        UserError: If they are further apart than float32 explains.
    """
    if precision.startswith(("16", "bf16", "transformer")) or logprobs.dtype not in (torch.float32, torch.float64):
        return
    apart = float((logprobs.detach() - sampler_logprobs)[mask].abs().max())
    if not apart < TOLERANCE:
        raise UserError(
            f"the engine's log-probabilities are up to {apart:.3g} nats from those of the policy that it sampled from: it does "
            "not compute what the policy does; set sampling.engine to "
            "rlhf_lightning.generation.transformers_engine.TransformersEngine"
        )
