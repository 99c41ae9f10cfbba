"""PPO's two clipped losses: hand values with their gradients, and float64 loops."""

import math

import pytest
import torch

from rlhf_lightning.functional.policy import clipped_policy_loss
from rlhf_lightning.functional.value import clipped_value_loss, explained_variance

ALL = torch.ones(1, 1, dtype=torch.bool)


def policy_loss_at(advantage, ratio):
    logprob = torch.tensor([[math.log(ratio) - 2.0]], requires_grad=True)
    old, advantages = torch.tensor([[-2.0]]), torch.tensor([[advantage]])
    loss, low, high = clipped_policy_loss(logprob, old, advantages, ALL, clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    return loss.item(), gradient.item(), (low | high).item()


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        (1.0, 1.5, -1.2, 0.0, True),
        (-1.0, 0.5, 0.8, 0.0, True),
        (-1.0, 5.0, 5.0, 5.0, False),
        (1.0, 0.5, -0.5, -0.5, False),
        (2.0, 1.1, -2.2, -2.2, False),
        (-2.0, 0.9, 1.8, 1.8, False),
    ],
)
def test_policy_loss_by_hand(advantage, ratio, loss, gradient, clipped):
    assert policy_loss_at(advantage, ratio) == pytest.approx((loss, gradient, clipped), abs=1e-5)


def test_on_policy_nothing_is_clipped_and_the_gradient_is_minus_the_advantage():
    advantages = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([2, 5, 4])[:, None]
    logprobs = (-advantages.abs()).clone().requires_grad_()
    old = logprobs.detach().clone()
    loss, low, high = clipped_policy_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(loss.detach(), -advantages * mask, rtol=0, atol=0)
    torch.testing.assert_close(gradient, -advantages * mask, rtol=0, atol=0)
    assert not (low | high).any()


def value_loss_by_definition(value, old, target, epsilon):
    near = min(max(value, old - epsilon), old + epsilon)
    free, clipped = (value - target) ** 2, (near - target) ** 2
    return 0.5 * max(free, clipped), clipped > free


def test_value_loss_is_the_larger_of_both_errors():
    generator = torch.Generator().manual_seed(1)
    values, old, returns = (torch.randn(6, 9, generator=generator) for _ in range(3))
    mask = torch.arange(9) < torch.tensor([1, 9, 4, 7, 2, 8])[:, None]
    loss, clipped = clipped_value_loss(values, old, returns, mask, clip_range=0.3)
    flags = []
    for b, t in mask.nonzero().tolist():
        expected, flag = value_loss_by_definition(float(values[b, t]), float(old[b, t]), float(returns[b, t]), 0.3)
        assert loss[b, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert clipped[b, t].item() == flag
        flags.append(flag)
    assert 0 < sum(flags) < len(flags)
    assert loss[~mask].eq(0).all()


def test_a_clipped_value_gets_no_gradient_and_a_free_one_its_error():
    values = torch.tensor([[1.0, 0.1]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, clipped = clipped_value_loss(values, torch.zeros(1, 2), torch.tensor([[1.5, 1.5]]), mask, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert loss[0].tolist() == pytest.approx([0.5 * 1.3**2, 0.5 * 1.4**2])
    assert gradient[0].tolist() == pytest.approx([0.0, -1.4])
    assert clipped.tolist() == [[True, False]]


def test_explained_variance_by_hand():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0, 99.0]]), torch.tensor([[True, True, True, True, False]])
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.full((1, 5), 7.0), returns, mask).item() == pytest.approx(0.0)
    assert explained_variance(returns + 5, returns, mask).item() == pytest.approx(1.0)  # a bias is not seen
    assert explained_variance(returns / 2, returns, mask).item() == pytest.approx(0.75)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones(1, 5), mask).item())
    assert math.isnan(explained_variance(torch.ones(1, 5), torch.ones(1, 5), mask).item())
    assert math.isnan(explained_variance(returns, returns, torch.zeros(1, 5, dtype=torch.bool)).item())


def test_two_ranks_explain_as_one_with_both_their_rows(on_two_ranks):
    """The second rank's returns do not vary; together 0, 1, 5, 5 do, and the critic misses 1, 0, 0, 0 of them."""
    returns, values = torch.tensor([[0.0, 1.0], [5.0, 5.0]]), torch.tensor([[-1.0, 1.0], [5.0, 5.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    parts = on_two_ranks(
        lambda rank, all_sum: explained_variance(values[[rank]], returns[[rank]], mask, all_sum=all_sum)
    )
    expected = 1 - (1 - 4 * 0.25**2) / (51 - 4 * 2.75**2)
    assert [part.item() for part in parts] == pytest.approx([expected] * 2)


def test_explained_variance_of_little_spread_is_not_lost():
    returns, mask = torch.tensor([[0.25, 0.75]]), torch.ones(1, 2, dtype=torch.bool)
    assert explained_variance(torch.zeros(1, 2), returns, mask).item() == 0.0
    assert explained_variance(torch.tensor([[0.25, 0.5]]), returns, mask).item() == 0.75
