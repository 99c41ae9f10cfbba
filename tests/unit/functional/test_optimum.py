"""The closed forms against numbers worked out by hand, and against searches that know nothing of them."""

import math

import pytest
import torch

from rlhf_lightning.functional.optimum import (
    exact_kl,
    expected,
    frontier,
    frontier_reward,
    ipo_optimum,
    kl_optimum,
    objective,
    win_rates,
)

HALF = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()


def problem(seed=0, prompts=3, responses=6):
    generator = torch.Generator().manual_seed(seed)
    ref, rewards = (torch.randn(prompts, responses, generator=generator, dtype=torch.float64) for _ in range(2))
    return ref.log_softmax(1), rewards


def climb(value, logits, steps=60):
    """The highest ``value(log-probabilities)``, found by Newton-like ascent alone."""
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=20, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -value(logits.log_softmax(1)).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return logits.detach().log_softmax(1)


def test_two_responses_by_hand():
    """A fair coin, reward ln 3 for heads, beta 1: heads three times as likely as tails, Z = 2."""
    logps, value = kl_optimum(HALF, torch.tensor([[math.log(3), 0.0]], dtype=torch.float64), beta=1.0)
    assert logps.exp().tolist()[0] == pytest.approx([0.75, 0.25])
    assert value.item() == pytest.approx(math.log(2))
    assert exact_kl(logps, HALF).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_no_search_finds_a_better_policy(beta):
    ref, rewards = problem()
    found = climb(lambda logps: objective(logps, ref, rewards, beta=beta), torch.zeros_like(ref))
    logps, value = kl_optimum(ref, rewards, beta=beta)
    torch.testing.assert_close(found.exp(), logps.exp(), rtol=0, atol=1e-7)
    torch.testing.assert_close(objective(found, ref, rewards, beta=beta), value, rtol=1e-12, atol=1e-12)


def test_what_any_policy_lacks_is_beta_times_its_kl_from_the_optimum():
    ref, rewards = problem()
    other = problem(seed=7)[0]
    logps, value = kl_optimum(ref, rewards, beta=0.7)
    lacks = value - objective(other, ref, rewards, beta=0.7)
    torch.testing.assert_close(lacks, 0.7 * exact_kl(other, logps), rtol=1e-12, atol=1e-12)
    assert (lacks > 0.01).all()


def test_the_advantage_of_every_response_vanishes_at_the_optimum():
    """reward - beta log(pi*/ref) is the same for every response: nothing is left to be learnt."""
    ref, rewards = problem()
    logps, value = kl_optimum(ref, rewards, beta=0.4)
    torch.testing.assert_close(rewards - 0.4 * (logps - ref), value[:, None].expand_as(ref), rtol=0, atol=1e-12)


def test_kl_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    assert exact_kl(p, q).item() == pytest.approx(0.218012, abs=1e-6)
    assert exact_kl(p, p).item() == 0


def test_a_response_of_probability_zero_counts_for_nothing():
    logps = torch.tensor([[0.0, -torch.inf]])
    assert expected(logps, torch.tensor([[2.0, torch.nan]])).item() == 2.0
    assert exact_kl(logps, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(math.log(2))


def test_win_rates_against_a_loop():
    ref, rewards = problem()
    found = win_rates(rewards, ref)
    for x in range(3):
        for y in range(6):
            slow = sum(ref[x, z].exp() / (1 + (rewards[x, z] - rewards[x, y]).exp()) for z in range(6))
            assert found[x, y].item() == pytest.approx(slow.item(), rel=1e-12)
    torch.testing.assert_close(expected(ref, found), torch.full((3,), 0.5, dtype=torch.float64))  # against itself


def test_no_search_finds_a_lower_ipo_loss():
    """The population loss of eq. 17 over all ordered pairs, each drawn from mu and labelled by Bradley-Terry."""
    ref, rewards = problem()
    mu, tau = problem(seed=3)[0], 0.2
    drawn = mu.exp()[:, :, None] * mu.exp()[:, None, :] * torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])

    def minus_loss(logps):
        h = logps - ref
        return -(drawn * (h[:, :, None] - h[:, None, :] - 1 / (2 * tau)) ** 2).sum((1, 2))

    found = climb(minus_loss, torch.zeros_like(ref))
    expected_logps = ipo_optimum(ref, rewards, mu, tau=tau)
    torch.testing.assert_close(found.exp(), expected_logps.exp(), rtol=0, atol=1e-7)
    assert expected_logps.exp().sum(1).sub(1).abs().max() < 1e-12


def test_the_frontier_goes_from_the_reference_to_the_best_responses():
    ref, rewards = problem()
    kl, reward = frontier(ref, rewards, torch.tensor([1e6, 1.0, 1e-3]))
    assert kl[0] < 1e-9
    assert reward[0].item() == pytest.approx(expected(ref, rewards).mean().item(), abs=1e-5)
    assert reward[2].item() == pytest.approx(rewards.max(1).values.mean().item(), abs=1e-6)
    assert kl[2].item() == pytest.approx(-ref.gather(1, rewards.argmax(1, keepdim=True)).mean().item(), abs=1e-6)
    assert kl.diff().min() > 0
    assert reward.diff().min() > 0


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_the_best_reward_for_a_kl_is_that_of_the_optimum_with_this_kl(beta):
    ref, rewards = problem()
    kl, reward = frontier(ref, rewards, torch.tensor([beta]))
    assert frontier_reward(ref, rewards, kl.item()) == pytest.approx(reward.item(), abs=1e-9)


def test_the_best_reward_for_no_kl_is_the_references_and_for_any_the_greedy_ones():
    ref, rewards = problem()
    assert frontier_reward(ref, rewards, 0.0) == pytest.approx(expected(ref, rewards).mean().item(), abs=1e-4)
    assert frontier_reward(ref, rewards, 100.0) == pytest.approx(rewards.max(1).values.mean().item(), abs=1e-3)


def test_no_policy_lies_above_the_frontier():
    ref, rewards = problem()
    for seed in range(200):
        logps = ((1 + seed % 4) * problem(seed=seed + 1)[0] + ref).log_softmax(1)
        kl = exact_kl(logps, ref).mean().item()
        assert expected(logps, rewards).mean().item() <= frontier_reward(ref, rewards, kl) + 1e-9
