"""Where the pair losses end on the population of pairs: at a closed form of their own, or elsewhere with the right order.

DPO and IPO are in test_tabular.py. Which of the losses have the KL optimum for their own is theory's to say: of those here
robust DPO on flipped labels alone.
"""

import pytest
import torch

from rlhf_lightning.evaluation.gradients import Population, preference_weights
from rlhf_lightning.functional.optimum import exact_kl, kl_optimum
from rlhf_lightning.losses import (
    AlphaDivergence,
    APOZeroLoss,
    BCOPairLoss,
    CPOLoss,
    EXOLoss,
    FDPOLoss,
    ForwardKL,
    HingeLoss,
    JensenShannon,
    NCALoss,
    NormalisedDPOLoss,
    ORPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOHardLoss,
)
from rlhf_lightning.losses.dpo import DiscoPOPLoss
from rlhf_lightning.losses.pairs import Pairs, ScoredResponses
from rlhf_lightning.worlds import EnumerableWorld
from tests.ground_truth.test_tabular import BETA, Tabular, descend, total_variation

FLIPPED = 0.2


@pytest.fixture(scope="module")
def world():
    return EnumerableWorld(seed=3, max_new_tokens=1, response_tokens=8)


def population(world, loss, weights):
    """A tabular policy, and the mean loss over all ordered pairs that it has."""
    policy, everything = Tabular(world), Population(loss, weights)
    mask = policy.mask.repeat(2 * len(world.prompts), 1)
    ref = policy.ref_token_logps().flatten(0, 1).repeat(2, 1)

    def loss_of(_):
        logprobs = policy.token_logps().flatten(0, 1).repeat(2, 1)
        return everything.pairs(Pairs(ScoredResponses(logprobs, mask, ref))).sum()

    return policy, loss_of


def trained(world, loss, weights=None):
    """Log-probabilities at the minimum; shape (prompts, responses)."""
    return descend(*population(world, loss, preference_weights(world) if weights is None else weights))


def roughly_trained(world, loss, weights):
    """The same for losses with edges and plains, where a search along lines gets lost."""
    policy, loss_of = population(world, loss, weights)
    optimizer = torch.optim.Adam([policy.logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        optimizer.zero_grad()
        loss_of(None).backward()
        optimizer.step()
        schedule.step()
    return policy.logps().detach()


def normalised(level_of, low, high):
    """Log-probabilities of which each prompt's sum to one, by bisection over the level c that the reward leaves free."""
    low, high = (torch.full((4, 1), end, dtype=torch.float64) for end in (low, high))
    for _ in range(200):
        middle = (low + high) / 2
        more = level_of(middle).exp().sum(1, keepdim=True) > 1
        low, high = torch.where(more, low, middle), torch.where(more, middle, high)
    return level_of(middle)


def test_robust_dpo_on_flipped_labels_reaches_the_kl_optimum_and_on_clean_ones_overshoots(world):
    clean = preference_weights(world)
    optimum, _ = kl_optimum(world.ref_logps, world.rewards, beta=BETA)
    loss = RobustDPOLoss(BETA, label_smoothing=FLIPPED)
    found = trained(world, loss, (1 - FLIPPED) * clean + FLIPPED * clean.transpose(1, 2))
    assert total_variation(found, optimum) < 1e-6
    overshot = roughly_trained(world, loss, clean)
    assert (exact_kl(overshot, world.ref_logps) > 1.5 * exact_kl(optimum, world.ref_logps)).all()


@pytest.mark.parametrize("kind", [ForwardKL(), JensenShannon(), AlphaDivergence(0.3)], ids=str)
def test_under_another_divergence_the_score_is_the_reward(world, kind):
    """s(h) = r / beta + c: forward KL has beta ref / (lambda - r), as GRPO's k3 in the loss."""
    s = world.rewards / BETA
    inverse = {
        ForwardKL: lambda c: -torch.log((-(s + c)).clamp(min=1e-300)),
        JensenShannon: lambda c: -torch.log(torch.expm1((-(s + c)).clamp(min=1e-300))),
        AlphaDivergence: lambda c: torch.log((1 - 0.7 * (s + c)).clamp(min=1e-300)) / -0.7,
    }[type(kind)]
    expected = normalised(lambda c: world.ref_logps + inverse(c), -100.0, 100.0)
    assert expected.exp().sum(1).tolist() == pytest.approx([1.0] * 4)
    found = trained(world, FDPOLoss(BETA, kind))
    assert total_variation(found, expected) < 1e-5
    assert total_variation(found, kl_optimum(world.ref_logps, world.rewards, beta=BETA)[0]) > 0.01


def test_length_normalised_dpo_multiplies_rewards_by_length():
    """h / n = r / beta + c, which is not the KL optimum where lengths differ."""
    world = EnumerableWorld(seed=3, max_new_tokens=2, response_tokens=3)
    n = torch.tensor([[len(y) for y in world.responses]], dtype=torch.float64)
    expected = normalised(lambda c: world.ref_logps + n * (world.rewards / BETA + c), -100.0, 100.0)
    found = trained(world, NormalisedDPOLoss(BETA))
    assert total_variation(found, expected) < 1e-5
    assert total_variation(found, kl_optimum(world.ref_logps, world.rewards, beta=BETA)[0]) > 0.01


# APO-down is left out: it lowers what is chosen too, and alone leaves no order.
WITH_REFERENCE = [
    HingeLoss(BETA), EXOLoss(BETA, 0.1), NCALoss(BETA), BCOPairLoss(BETA), SPPOHardLoss(BETA), APOZeroLoss(BETA),
    DiscoPOPLoss(BETA),
]  # fmt: skip
WITHOUT = [CPOLoss(BETA), SimPOLoss(2.0, 0.5), ORPOLoss(0.5)]


@pytest.mark.parametrize("loss", [*WITH_REFERENCE, *WITHOUT], ids=str)
def test_others_put_responses_in_the_order_of_their_rewards_and_are_not_the_kl_optimum(world, loss):
    """Of every pair equally often; without a reference it is the probabilities that are in order, not their ratios to it."""
    r = world.rewards
    weights = torch.sigmoid(r[:, :, None] - r[:, None, :])
    found = roughly_trained(world, loss, weights / weights.sum())
    score = found if loss in WITHOUT else found - world.ref_logps
    assert rank_correlation(score, r).min() > 0.8
    assert exact_kl(found, kl_optimum(world.ref_logps, r, beta=BETA)[0]).max() > 0.01


def rank_correlation(x, y):
    """Spearman's, of each row."""
    ranks = [v.argsort(1).argsort(1).double() for v in (x, y)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    return (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))
