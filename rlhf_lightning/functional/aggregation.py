"""From a loss of each token to one number: what a token weighs is a scientific choice, so it has a name and no default."""

from typing import Literal, NamedTuple

from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length"]


class Counts(NamedTuple):
    """How much an optimizer step learns from, over all micro-batches and ranks.

    Attributes:
        tokens: That count. Scalar.
        sequences: With a token that counts. Scalar.
    """

    tokens: Tensor
    sequences: Tensor


def counts(mask: Tensor) -> Counts:
    """Of a batch. ``mask`` is True on tokens that count; shape (batch, length), bool."""
    return Counts(mask.sum(), mask.any(dim=1).sum())


def token_weights(mask: Tensor, *, how: Aggregation, total: Counts, longest: int) -> Tensor:
    r"""What each token's loss is multiplied by before it is summed.

    ================  ==============================================  ==========================
    ``how``           weight of token t of response i                  used by
    ================  ==============================================  ==========================
    token_mean        :math:`1 / \sum_j |y_j|`                         DAPO, CISPO, Lite PPO
    sequence_mean     :math:`1 / (N |y_i|)`                            GRPO, GSPO
    sequence_sum      :math:`1 / N`                                    REINFORCE, RLOO
    constant_length   :math:`1 / (N L)`, L the longest allowed         Dr.GRPO
    ================  ==============================================  ==========================

    Only the last two give the gradient of an expectation over responses (up to the constant L). The first weighs a response
    by how long the others of the step are. The second weighs the tokens of a long response less, so that long wrong answers are
    punished less a token than short ones.

    Args:
        mask: True on tokens that count. Shape (batch, length), bool.
        how: Which.
        total: Of the whole optimizer step.
        longest: L, in tokens.

    Returns:
        Shape (batch, length), float32; zero where masked.

    Source: GRPO https://arxiv.org/abs/2402.03300 eq. 3; DAPO https://arxiv.org/abs/2503.14476 eq. 8; Dr.GRPO
    https://arxiv.org/abs/2503.20783, section 3.1
    """
    ones = mask.float()
    if how == "token_mean":
        return ones / total.tokens.clamp(min=1)
    per_sequence = ones / total.sequences.clamp(min=1)
    if how == "sequence_mean":
        return per_sequence / ones.sum(dim=1, keepdim=True).clamp(min=1)
    return per_sequence / longest if how == "constant_length" else per_sequence
