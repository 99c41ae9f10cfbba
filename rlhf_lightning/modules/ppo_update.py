"""How PPO learns from a rollout."""

from dataclasses import dataclass, field

from rlhf_lightning.losses.checks import require_one_or_more
from rlhf_lightning.rewards.failures import RewardFailures
from rlhf_lightning.rollouts.mismatch import Importance


@dataclass(frozen=True)
class PPOUpdate:
    """How a rollout is learnt from.

    Attributes:
        epochs: Passes over the rollout.
        minibatch_size: Responses an optimizer step, on one rank.
        micro_batch_size: Responses a forward; gradients are summed, so it changes memory and nothing else.
        target_kl: Stop the passes once the mean k2 between the policy and the one that sampled exceeds this; None never.
        critic_lr: Learning rate of the critic; None for that of the policy.
        max_grad_norm: Gradients of policy and critic together are clipped to this norm.
        importance: Corrects for an engine that samples with numbers of its own.
        reward_failures: What becomes of a rollout that could not be scored.
    """

    epochs: int = 4
    minibatch_size: int = 64
    micro_batch_size: int = 64
    target_kl: float | None = None
    critic_lr: float | None = None
    max_grad_norm: float = 1.0
    importance: Importance = Importance()  # noqa: RUF009  (frozen)
    reward_failures: RewardFailures = field(default_factory=RewardFailures)

    def __post_init__(self) -> None:
        """Refuse an update that would not happen."""
        require_one_or_more(
            epochs=self.epochs, minibatch_size=self.minibatch_size, micro_batch_size=self.micro_batch_size
        )
