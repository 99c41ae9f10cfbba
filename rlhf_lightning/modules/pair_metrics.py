"""What is counted of pairs of responses, under the names that TRL's users know."""

from torch import Tensor

from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.ranking import preference_accuracy
from rlhf_lightning.losses import PairLoss
from rlhf_lightning.losses.pairs import Counted, Pairs, halves
from rlhf_lightning.models.policy import PolicyOutput

NAMES = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy",
)  # fmt: skip


def of_rewards(kind: PairLoss, loss: Tensor, pairs: Pairs) -> Counted:
    """The loss and the implicit rewards, over pairs. ``loss``: of each pair, shape (pairs,)."""
    chosen, rejected = halves(kind.rewards(pairs.responses))
    return {
        "loss": (loss.sum(), len(pairs)),
        "rewards/chosen": (chosen.sum(), len(pairs)),
        "rewards/rejected": (rejected.sum(), len(pairs)),
        "rewards/accuracies": (preference_accuracy(chosen, rejected).sum(), len(pairs)),
        "rewards/margins": ((chosen - rejected).sum(), len(pairs)),
    }


def of_tokens(output: PolicyOutput, pairs: Pairs) -> Counted:
    """Log-probabilities over pairs; logits, entropy and accuracy over tokens, whatever the loss."""
    mask, (chosen_logps, rejected_logps) = pairs.responses.mask, pairs.logps
    (chosen, rejected), (chosen_logit, rejected_logit) = halves(mask), halves(output.mean_logit)
    return {
        "logps/chosen": (chosen_logps.sum(), len(pairs)),
        "logps/rejected": (rejected_logps.sum(), len(pairs)),
        "logits/chosen": (masked_sum(chosen_logit, chosen), chosen.sum()),
        "logits/rejected": (masked_sum(rejected_logit, rejected), rejected.sum()),
        "entropy": (masked_sum(output.entropy, mask), mask.sum()),
        "mean_token_accuracy": (halves(output.greedy)[0].sum(), chosen.sum()),
    }
