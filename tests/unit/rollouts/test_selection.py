"""What each sampling method keeps of a prompt's samples, and that what it keeps has the distribution that it promises."""

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.optimum import kl_optimum
from rlhf_lightning.rollouts.selection import RAFT, RSO, BestOfN, RewardWeighted

SCORES = torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0], dtype=torch.float64)
TEXTS = ["a", "b", "c", "b", "d"]


def select(method, scores=SCORES, texts=TEXTS, seed=0):
    return method.select(scores, texts, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        (BestOfN(), {1: 1.0}),
        (RAFT(), {1: 1.0}),
        (RAFT(keep=2), {1: 0.5, 2: 0.5}),  # b was drawn twice and counts once
        (RAFT(keep=2, distinct=False), {1: 0.5, 3: 0.5}),
        (RAFT(keep=None, least=0.0), {1: 1 / 3, 2: 1 / 3, 0: 1 / 3}),
        (RAFT(keep=None, least=3.0), {}),
        (RSO(beta=1e-3), {1: 0.5, 3: 0.5}),  # both of the best score are certain to be kept
        (RSO(beta=1e6), dict.fromkeys([1, 3, 2, 0, 4], 0.2)),
        (RewardWeighted(beta=1e-3), {1: 0.5, 3: 0.5}),
        (RewardWeighted(beta=1e9), dict.fromkeys([1, 3, 2, 0, 4], 0.2)),
    ],
)
def test_what_is_kept_and_what_it_weighs(method, kept):
    found = select(method)
    assert list(found) == list(kept)
    assert list(found.values()) == pytest.approx(list(kept.values()), abs=1e-6)


def test_weights_are_the_exponentials_of_the_rewards():
    found = select(RewardWeighted(beta=0.5))
    e = [torch.exp(2 * s).item() for s in SCORES]
    for number, weight in found.items():
        assert weight == pytest.approx(e[number] / sum(e), rel=1e-9)


def test_samples_of_no_weight_are_left_out_and_the_others_share_it():
    found = select(RewardWeighted(beta=0.1, least=1e-3))
    assert list(found) == [1, 3]
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)


@pytest.fixture(scope="module")
def drawn():
    """Samples of a policy over eight responses, 2,000 prompts of 64 each, and the optimum of the regularised objective."""
    generator = torch.Generator().manual_seed(3)
    ref = torch.randn(1, 8, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    rewards = torch.randn(8, generator=generator, dtype=torch.float64)
    samples = torch.multinomial(ref[0].exp(), 2000 * 64, replacement=True, generator=generator).view(2000, 64)
    return samples, rewards, kl_optimum(ref, rewards[None], beta=0.7)[0][0].exp()


@pytest.mark.parametrize("ceiling", [None, 2.5])
def test_rso_keeps_samples_of_the_optimum(drawn, ceiling):
    samples, rewards, optimum = drawn
    counts = torch.zeros(8, dtype=torch.float64)
    for seed, row in enumerate(samples):
        for number in select(RSO(beta=0.7, ceiling=ceiling), rewards[row], [str(y) for y in row.tolist()], seed):
            counts[row[number]] += 1
    kept = 0.2 * samples.numel() if ceiling is None else 0.02 * samples.numel()
    assert counts.sum() > kept
    assert (counts / counts.sum() - optimum).abs().sum() / 2 < 0.02


def test_reward_weights_have_the_optimum_as_their_maximum_likelihood(drawn):
    """Of a table, the weighted likelihood is greatest at the weighted shares."""
    samples, rewards, optimum = drawn
    shares = torch.zeros(8, dtype=torch.float64)
    for row in samples:
        for number, weight in select(RewardWeighted(beta=0.7), rewards[row], [""] * 64).items():
            shares[row[number]] += weight
    assert (shares / shares.sum() - optimum).abs().sum() / 2 < 0.02


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RAFT(keep=0), "keep is at least 1"),
        (lambda: RAFT(keep=None), "every sample"),
        (lambda: RSO(beta=0), "beta must be positive"),
        (lambda: RewardWeighted(beta=-1), "beta must be positive"),
        (lambda: RewardWeighted(least=0), "least"),
        (lambda: select(RSO(ceiling=1.0)), "above the ceiling"),
    ],
)
def test_senseless_settings_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()
