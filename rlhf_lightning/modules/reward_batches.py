"""What a batch of comparisons says about scores, whichever kind it is: pairs, rankings, or single labelled responses."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.batches import PreferenceBatch, RankingBatch, UnpairedBatch
from rlhf_lightning.functional.listwise import kendall_tau, ordered_pairs, pair_shares
from rlhf_lightning.functional.ranking import preference_accuracy
from rlhf_lightning.losses import LabelledLoss, ListLoss, RankingLoss

RewardBatch = PreferenceBatch | RankingBatch | UnpairedBatch
RewardLoss = RankingLoss | ListLoss | LabelledLoss
Counted = dict[str, tuple[Tensor, Tensor | int]]


@dataclass(frozen=True)
class Pairs:
    """Which scores of a batch are compared.

    Attributes:
        better: Places of the better responses. Shape (pairs,), int64.
        worse: Of the worse ones. Same shape.
        share: What each pair counts in the sum of losses. Same shape, or scalar.
        margin: By how much the better should lead. Same shape, or scalar.
        probability: That the better is the better; None for 1. Same shape.
    """

    better: Tensor
    worse: Tensor
    share: Tensor
    margin: Tensor
    probability: Tensor | None = None


def compared(batch: PreferenceBatch | RankingBatch) -> Pairs:
    """Every pair of a batch: of rankings all that are told apart, whose loss is their mean for each prompt."""
    if isinstance(batch, PreferenceBatch):
        places = torch.arange(len(batch.input_ids), device=batch.margin.device)
        share = batch.margin.new_ones(()) if batch.weight is None else batch.weight
        better, worse = places.chunk(2)
        return Pairs(better, worse, share, batch.margin, batch.probability)
    better, worse = ordered_pairs(batch.ranks, batch.prompt)
    prompt = batch.prompt[better]
    return Pairs(better, worse, pair_shares(prompt) * batch.weight[prompt], batch.ranks.new_zeros(()))


def summed_loss(loss: RewardLoss, batch: RewardBatch, scores: Tensor) -> Tensor:
    """The loss of one member's scores, summed over pairs, prompts or responses. Scores of shape (responses,); scalar."""
    if isinstance(batch, UnpairedBatch):
        assert isinstance(loss, LabelledLoss)
        return loss.outcomes(scores, batch.label).sum()
    if isinstance(loss, ListLoss):
        assert isinstance(batch, RankingBatch)
        return (batch.weight * loss.lists(scores, batch.ranks, batch.prompt, len(batch.weight))).sum()
    assert isinstance(loss, RankingLoss)
    pairs = compared(batch)
    chosen, rejected = scores[pairs.better], scores[pairs.worse]
    return (pairs.share * loss.pairs(chosen, rejected, pairs.margin, pairs.probability)).sum()


def size(batch: RewardBatch) -> int:
    """How many pairs, prompts or responses the loss is a mean over."""
    if isinstance(batch, PreferenceBatch):
        return len(batch.margin)
    return len(batch.weight) if isinstance(batch, RankingBatch) else len(batch.label)


def differences(batch: RewardBatch, scores: Tensor) -> Tensor:
    """By how much the better response leads, for every pair that is told apart; of single responses, by how much a right
    one is above zero, or a wrong one below. Scores of shape (responses,); shape (pairs,).
    """
    if isinstance(batch, UnpairedBatch):
        return torch.where(batch.label, scores, -scores)
    pairs = compared(batch)
    lead = scores[pairs.better] - scores[pairs.worse]
    if pairs.probability is None:
        return lead
    told = pairs.probability != 0.5
    return torch.where(pairs.probability < 0.5, -lead, lead)[told]


def pair_hashes(batch: RewardBatch) -> Tensor:
    """Hashes of the prompt of each pair, and of the prompt with the better response, in the order of :func:`differences`.

    Shape (pairs, 2), int64, on the CPU: the same on every rank and in every order of the rows.
    """
    rows = torch.arange(len(batch.label)) if isinstance(batch, UnpairedBatch) else compared(batch).better.cpu()
    if isinstance(batch, PreferenceBatch) and batch.probability is not None:
        rows = rows[(batch.probability != 0.5).cpu()]
    ids, real, response = (x.cpu() for x in (batch.input_ids, batch.attention_mask, batch.response_mask))
    prompt = real & (response.cumsum(dim=1) == 0)  # a response may hold turns that are not the assistant's
    hashes = [[row_hash(ids[i][mask]) for mask in (prompt[i], real[i])] for i in rows.tolist()]
    return torch.tensor(hashes, dtype=torch.int64).reshape(-1, 2)


def row_hash(ids: Tensor) -> int:
    """A hash of token ids that is the same in every process."""
    digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def diagnostics(batch: RewardBatch, scores: Tensor) -> Counted:
    """What is counted of one member's scores, by TRL's names. Scores of shape (responses,)."""
    lead = differences(batch, scores)
    found: Counted = {
        "accuracy": (preference_accuracy(lead, torch.zeros_like(lead)).sum(), len(lead)),
        "margin": (lead.sum(), len(lead)),
        "min_reward": (scores.min(), 1),
        "mean_reward": (scores.sum(), len(scores)),
        "max_reward": (scores.max(), 1),
    }
    if isinstance(batch, RankingBatch):
        prompts = len(batch.weight)
        found["kendall_tau"] = (kendall_tau(scores, batch.ranks, batch.prompt, prompts=prompts).sum(), prompts)
    return found


def shown(batch: RewardBatch, count: int) -> list[tuple[int, str, int]]:
    """Indices of the responses to the first ``count`` prompts, what people said of each, and the index of its row."""
    if isinstance(batch, PreferenceBatch):
        pairs = len(batch.margin)
        return [
            (place, name, row)
            for row in range(min(count, pairs))
            for place, name in ((row, "chosen"), (row + pairs, "rejected"))
        ]
    if isinstance(batch, RankingBatch):
        first = zip(batch.ranks.tolist(), batch.prompt.tolist(), strict=True)
        return [(index, f"rank {rank:g}", row) for index, (rank, row) in enumerate(first) if row < count]
    return [(row, "right" if label else "wrong", row) for row, label in enumerate(batch.label[:count].tolist())]
