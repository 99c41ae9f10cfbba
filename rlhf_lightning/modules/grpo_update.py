"""How GRPO and its relatives draw their groups and learn from them."""

from dataclasses import dataclass, field

from rlhf_lightning.errors import UserError
from rlhf_lightning.losses.checks import require_interface, require_one_or_more
from rlhf_lightning.rewards.failures import RewardFailures
from rlhf_lightning.rollouts.group_advantages import CriticFree
from rlhf_lightning.rollouts.mismatch import Importance


@dataclass(frozen=True)
class Groups:
    """The responses of an iteration.

    Attributes:
        size: Responses to each prompt.
        mask_truncated: Responses that were cut off count in their group's mean and deviation, and teach nothing else
            ("overlong filtering").
        prompts: Dynamic sampling: go through the prompts of the batch until so many, on each rank, have responses that
            differ in score, and learn from these. The batch is the cap: were there fewer, groups that agree fill up. None
            takes every prompt of the batch.
    """

    size: int = 8
    mask_truncated: bool = False
    prompts: int | None = None

    def __post_init__(self) -> None:
        """Refuse groups that are none."""
        if self.size < 1 or (self.prompts is not None and self.prompts < 1):
            raise UserError(f"groups.size and groups.prompts are at least 1: {self}")


@dataclass(frozen=True)
class GRPOUpdate:
    """How a rollout is learnt from.

    Attributes:
        epochs: Passes over the rollout. More than one step a rollout is learning from another policy's responses.
        minibatch_size: Responses an optimizer step, on one rank: whole groups.
        micro_batch_size: Responses a forward; gradients are summed, so it changes memory and nothing else.
        target_kl: Stop the passes once the mean k2 between the policy and the one that sampled exceeds this; None never.
        max_grad_norm: Gradients are clipped to this norm.
        importance: Corrects for an engine that samples with numbers of its own.
        reward_failures: What becomes of a rollout that could not be scored.
    """

    epochs: int = 1
    minibatch_size: int = 64
    micro_batch_size: int = 64
    target_kl: float | None = None
    max_grad_norm: float = 1.0
    importance: Importance = Importance()  # noqa: RUF009  (frozen)
    reward_failures: RewardFailures = field(default_factory=RewardFailures)

    def __post_init__(self) -> None:
        """Refuse an update that would not happen."""
        require_one_or_more(
            epochs=self.epochs, minibatch_size=self.minibatch_size, micro_batch_size=self.micro_batch_size
        )


def check_groups(groups: Groups, advantages: CriticFree, update: GRPOUpdate) -> None:
    """Make sure that there are groups, and that minibatches hold whole ones.

    Raises:
        UserError: If not; names the key.
    """
    require_interface("advantages", advantages, CriticFree)
    if groups.size < advantages.least_group:
        raise UserError(
            f"{type(advantages).__name__} holds a response against the others of its prompt, of which groups.size "
            f"{groups.size} leaves none; set it to {advantages.least_group} or more"
        )
    if groups.prompts is not None and groups.size < 2:
        raise UserError("groups.prompts asks for prompts whose responses differ, so groups.size must be 2 or more")
    if update.minibatch_size % groups.size:
        raise UserError(
            f"update.minibatch_size {update.minibatch_size} is no multiple of groups.size {groups.size}: a step is on "
            "whole groups"
        )
