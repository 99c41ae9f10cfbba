"""The comparisons of methods that learn from groups: two passes over eight scripted responses to two prompts."""

from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.losses import CISPOLoss, ClippedLoss, PolicyLoss, SequenceClippedLoss
from rlhf_lightning.rollouts.group_advantages import CriticFree, GroupMean, LeaveOneOut

SIZE, ENTROPY_COEF = 4, 0.2
K3_COEF, K1_COEF = 0.003, 0.3  # k3 of networks so far apart is large
CAP, TWO_SIDED = 1.3, 1.5
GRPO_LOSS = ClippedLoss()


@dataclass(frozen=True)
class Group:
    """One iteration of GRPO, RLOO or a relative.

    Attributes:
        trl: Settings of TRL's trainer, beside those that all cases share.
        loss: Ours.
        aggregation: Ours.
        advantages: Ours.
        method: "grpo" or "rloo".
        kl_coef: Weight of the KL, k3 in GRPO's loss and k1 in RLOO's reward; 0 for no reference.
        architecture: Of the network.
        mask_truncated: Whether the response that is cut off is left out.
        entropy_coef: Weight of the entropy bonus.
        micro_batches: How many TRL makes of a step.
        lr: Of plain gradient descent; so large that the second pass meets the bounds.
    """

    trl: dict[str, Any]
    loss: PolicyLoss = GRPO_LOSS
    aggregation: str = "sequence_mean"
    advantages: CriticFree = field(default_factory=GroupMean)
    method: str = "grpo"
    kl_coef: float = 0.0
    architecture: str = "llama"
    mask_truncated: bool = False
    entropy_coef: float = 0.0
    micro_batches: int = 1
    lr: float = 0.05


GRPO = {"loss_type": "grpo", "use_bias_correction_kl": False}
DAPO = {"loss_type": "dapo", "epsilon_high": 0.28}
CLIP_HIGHER = ClippedLoss(clip_high=0.28)
RLOO = SequenceClippedLoss(clip_low=0.2, clip_high=0.2, length_normalised=False)


def rloo(**changes: Any) -> Group:
    return Group({}, loss=RLOO, advantages=LeaveOneOut(), method="rloo", kl_coef=K1_COEF, lr=0.01, **changes)


# Computed alike; what TRL calls them is in `trl`.
EQUAL: dict[str, Group] = {
    "grpo-llama": Group(GRPO, kl_coef=K3_COEF),
    "grpo-batch-std": Group({**GRPO, "scale_rewards": "batch"}, advantages=GroupMean(scale="batch")),
    "grpo-accumulated": Group(GRPO, kl_coef=K3_COEF, micro_batches=2),
    "dr-grpo": Group(
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        aggregation="constant_length",
        advantages=GroupMean(scale="none"),
    ),
    "dapo": Group(DAPO, CLIP_HIGHER, "token_mean", mask_truncated=True, entropy_coef=ENTROPY_COEF),
    "dapo-accumulated": Group(DAPO, CLIP_HIGHER, "token_mean", micro_batches=4),
    "bnpo": Group({"loss_type": "bnpo"}, aggregation="token_mean"),
    "cispo": Group({"loss_type": "cispo", "epsilon_high": CAP}, CISPOLoss(ratio_cap=CAP), "token_mean"),
    "gspo": Group(
        {**GRPO, "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}, SequenceClippedLoss()
    ),
    "two-sided": Group({**GRPO, "delta": TWO_SIDED}, ClippedLoss(ratio_cap=TWO_SIDED)),
    "rloo": rloo(),
    "rloo-accumulated": rloo(micro_batches=2),
}
# Apart, by what the tests name.
APART: dict[str, Group] = {
    "grpo-truncated": Group(GRPO, mask_truncated=True),
    "grpo-entropy": Group(GRPO, entropy_coef=ENTROPY_COEF),
    "bnpo-accumulated": Group({"loss_type": "bnpo"}, aggregation="token_mean", micro_batches=4),
    "grpo-corrected-kl": Group({"loss_type": "grpo"}, kl_coef=K3_COEF),
    "grpo-gpt2": Group(GRPO, architecture="gpt2"),
}
GROUPS = EQUAL | APART


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Different within each group."""
    return [(sum(ids) % 11) / 4 for ids in completion_ids]
