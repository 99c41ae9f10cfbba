"""PPO's loss: three terms that are clipped and weighed."""

from dataclasses import dataclass

from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.policy import clipped_policy_loss
from rlhf_lightning.functional.value import clipped_value_loss
from rlhf_lightning.losses.checks import require_not_negative, require_positive


@dataclass(frozen=True)
class PPOLoss:
    """PPO's three terms: clipped surrogate, ``value_coef`` times the value loss, minus ``entropy_coef`` times entropy.

    Attributes:
        clip_range: The ratio is clipped outside 1 +- this, in (0, 1).
        dual_clip: Bound on the ratio of tokens with a negative advantage, above 1 + clip_range; None for no bound.
        value_clip_range: Values are clipped to this distance from those of the rollout. Positive.
        value_coef: Weight of the value loss. At least 0.
        entropy_coef: Weight of the entropy bonus. At least 0.
        ptx_coef: Weight of the likelihood of the text that a ``PretrainingMixDataModule`` brings along (PPO-ptx). At least 0.
    """

    clip_range: float = 0.2
    dual_clip: float | None = None
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which the loss means nothing."""
        require_positive("value_clip_range", self.value_clip_range)
        if not 0 < self.clip_range < 1:
            raise UserError(f"clip_range is in (0, 1), not {self.clip_range}")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_range:
            raise UserError(f"dual_clip must be above 1 + clip_range = {1 + self.clip_range:g}, not {self.dual_clip}")
        require_not_negative(value_coef=self.value_coef, entropy_coef=self.entropy_coef, ptx_coef=self.ptx_coef)

    def policy(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Summed policy loss and the number of clipped tokens, scalars."""
        bounds = {"clip_low": self.clip_range, "clip_high": self.clip_range, "ratio_cap": self.dual_clip}
        loss, low, high = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, **bounds)  # type: ignore[arg-type]
        return loss.sum(), low.sum() + high.sum()

    def value(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Summed value loss and the number of clipped tokens, scalars."""
        loss, clipped = clipped_value_loss(values, old_values, returns, mask, clip_range=self.value_clip_range)
        return loss.sum(), clipped.sum()

    def total(self, policy: Tensor, value: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        """The three terms together, summed over tokens. ``entropy`` is per token, shape (batch, length)."""
        return policy + self.value_coef * value - self.entropy_coef * masked_sum(entropy, mask)
