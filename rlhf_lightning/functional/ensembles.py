"""One score from those of several reward models, which agree where they know and differ where they guess."""

from torch import Tensor


def worst_case(scores: Tensor) -> Tensor:
    r"""The least favourable member's score: :math:`\min_k r_k`.

    Args:
        scores: Of every member, brought to one scale. Shape (responses, members).

    Returns:
        Shape (responses,).

    Source: Coste et al. 2023, eq. 4 (WCO), https://arxiv.org/abs/2310.02743
    """
    return scores.amin(dim=-1)


def uncertainty_weighted(scores: Tensor, *, coefficient: float) -> Tensor:
    r"""The mean, less for what the members do not agree on.

    .. math:: \frac{1}{K} \sum_k r_k - \lambda \cdot \frac{1}{K} \sum_k (r_k - \bar r)^2

    Args:
        scores: Of every member, brought to one scale. Shape (responses, members).
        coefficient: :math:`\lambda \ge 0`; at 0 the mean alone.

    Returns:
        Shape (responses,).

    Source: Coste et al. 2023, eq. 5 (UWO), https://arxiv.org/abs/2310.02743
    """
    return scores.mean(dim=-1) - coefficient * scores.var(dim=-1, correction=0)


def disagreement(scores: Tensor) -> Tensor:
    """Standard deviation of the members' scores. Shape (responses, members) to (responses,)."""
    return scores.std(dim=-1, correction=0)
