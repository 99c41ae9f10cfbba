"""Best-of-n, rejection and weights: hand values, enumeration of all subsets, and closed forms over small response spaces."""

from itertools import combinations

import pytest
import torch

from rlhf_lightning.functional.best_of_n import (
    acceptance_probabilities,
    best_of_n_kl,
    best_of_n_logps,
    best_of_n_means,
    best_of_n_win_rate,
    exponential_weights,
)
from rlhf_lightning.functional.optimum import exact_kl, kl_optimum


def problem(responses=512, seed=0):
    """A policy and rewards without ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, responses, generator=generator, dtype=torch.float64)
    return logits.log_softmax(dim=1), torch.randn(1, responses, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("n", "kl"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (8, 1.204442), (16, 1.835089), (64, 3.174508)]
)
def test_hand_values_of_the_kl(n, kl):
    assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)
    assert best_of_n_win_rate(n) == pytest.approx(n / (n + 1))


@pytest.mark.parametrize(("n", "mean"), [(1, 3), (2, 4), (5, 5)])
def test_hand_values_of_the_unbiased_estimator(n, mean):
    scores = torch.tensor([[4.0, 1.0, 5.0, 2.0, 3.0]])
    assert best_of_n_means(scores, scores, n).item() == pytest.approx(mean)


def over_all_subsets(scores, values, n):
    """By definition: the mean over every subset of n; among its best samples one is chosen at random."""
    outcomes = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        best = [values[i] for i in subset if scores[i] == top]
        outcomes.append(sum(best) / len(best))
    return sum(outcomes) / len(outcomes)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_the_estimator_is_the_mean_over_all_subsets_ties_included(n):
    scores, values = [0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 2.0], [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    found = best_of_n_means(torch.tensor([scores] * 2), torch.tensor([values, scores]), n)
    expected = [over_all_subsets(scores, values, n), over_all_subsets(scores, scores, n)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_more_cannot_be_known_than_was_drawn(n):
    with pytest.raises(ValueError, match="3 samples"):
        best_of_n_means(torch.ones(1, 3), torch.ones(1, 3), n)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 64])
def test_enumerated_kl_and_win_rate_stay_just_below_their_bounds(n):
    ref, rewards = problem()
    best = best_of_n_logps(ref, rewards, n)
    assert best.exp().sum().item() == pytest.approx(1, abs=1e-12)
    kl = exact_kl(best, ref).item()
    assert best_of_n_kl(n) * 0.97 < kl < best_of_n_kl(n)
    wins = (rewards[0][:, None] > rewards[0]).double() + 0.5 * (rewards[0][:, None] == rewards[0]).double()
    rate = (best[0].exp() @ wins @ ref[0].exp()).item()
    assert best_of_n_win_rate(n) * 0.99 < rate < best_of_n_win_rate(n) + 1e-12


def test_the_best_of_one_is_the_policy_and_of_very_many_the_best_response():
    ref, rewards = problem(40)
    torch.testing.assert_close(best_of_n_logps(ref, rewards, 1), ref)
    assert best_of_n_logps(ref, rewards, 10**6)[0, rewards.argmax()].exp() > 0.999


def test_the_formula_is_what_sampling_gives_within_two_percent():
    ref, rewards = problem(12)
    draws = torch.multinomial(ref[0].exp(), 20_000 * 4, replacement=True, generator=torch.Generator().manual_seed(1))
    draws = draws.view(20_000, 4)
    best = draws.gather(1, rewards[0][draws].argmax(dim=1, keepdim=True)).flatten()
    shares = torch.bincount(best, minlength=12) / len(best)
    assert (shares - best_of_n_logps(ref, rewards, 4)[0].exp()).abs().sum() / 2 < 0.02


def test_a_tie_gives_the_mass_to_the_class_and_shares_it_as_the_policy_does():
    ref = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    best = best_of_n_logps(ref, rewards, 3)[0].exp()
    expected = [0.125 * 0.2, 0.875 * 0.4, 0.875 * 0.6, 0.125 * 0.8]  # F is 1/2, then 1
    torch.testing.assert_close(best, torch.tensor(expected, dtype=torch.float64))


def test_the_reward_gain_is_most_of_what_any_policy_could_have_at_that_kl():
    """The share of the gain of the KL-optimal policy: 86 to 99 % from n = 2 to 64 in the reference's own problem."""
    ref, rewards = problem()
    shares = []
    for n in (2, 8, 64):
        best = best_of_n_logps(ref, rewards, n)
        spent, gained = exact_kl(best, ref).item(), ((best.exp() - ref.exp()) * rewards).sum().item()
        low, high = 1e-3, 1e3
        for _ in range(80):  # the temperature whose optimum spends as much
            beta = (low * high) ** 0.5
            optimum = kl_optimum(ref, rewards, beta=beta)[0]
            low, high = (low, beta) if exact_kl(optimum, ref) < spent else (beta, high)
        shares.append(gained / ((optimum.exp() - ref.exp()) * rewards).sum().item())
    assert shares == sorted(shares)
    assert 0.8 < shares[0] < 0.95
    assert 0.98 < shares[-1] < 1


def test_reward_weighted_samples_of_the_policy_are_the_optimum():
    """The weights of every response drawn in its true proportion are pi* over pi_ref, up to what sums to one."""
    ref, rewards = problem(30)
    weights = exponential_weights(rewards + 0.7 * ref, beta=0.7)  # each response once, as often as it is drawn
    torch.testing.assert_close(weights.log(), kl_optimum(ref, rewards, beta=0.7)[0])
    assert weights.sum().item() == pytest.approx(1)


def test_accepted_samples_of_the_policy_follow_the_optimum():
    ref, rewards = problem(10)
    chance = acceptance_probabilities(rewards, beta=0.5)
    assert chance.max() == 1
    torch.testing.assert_close((ref + chance.log()).log_softmax(dim=1), kl_optimum(ref, rewards, beta=0.5)[0])
    above = acceptance_probabilities(rewards, beta=0.5, ceiling=rewards.max().item() + 1)
    torch.testing.assert_close(above, chance * torch.exp(torch.tensor(-2.0)).double())
