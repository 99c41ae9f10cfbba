"""Ratios of tokens and of responses, and what bounds them: hand values with their gradients."""

import math

import pytest
import torch

from rlhf_lightning.functional.policy import (
    cispo_loss,
    clipped_policy_loss,
    clipped_sequence_loss,
    reinforce_loss,
)

RATIOS = torch.tensor([[1.2, 0.9, 1.1]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def at(function, ratio, advantage, **options):
    """Loss, gradient in the log-probability, and the two flags of one token."""
    logprob = torch.tensor([[math.log(ratio) - 2.0]], requires_grad=True)
    old, advantages, mask = torch.tensor([[-2.0]]), torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool)
    loss, low, high = function(logprob, old, advantages, mask, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    return loss.item(), gradient.item(), low.item(), high.item()


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [
        (1.0, 1.25, (-1.25, -1.25, False, False)),  # below DAPO's higher bound
        (1.0, 1.5, (-1.28, 0.0, False, True)),
        (-1.0, 0.5, (0.8, 0.0, True, False)),
        (-1.0, 2.9, (2.9, 2.9, False, False)),
        (-1.0, 5.0, (3.0, 0.0, False, True)),  # dual clip
        (1.0, 5.0, (-1.28, 0.0, False, True)),
    ],
)
def test_unlike_bounds_and_a_cap(advantage, ratio, expected):
    found = at(clipped_policy_loss, ratio, advantage, clip_low=0.2, clip_high=0.28, ratio_cap=3.0)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("normalised", "ratio"), [(True, 1.0591), (False, 1.188)])
def test_the_ratio_of_a_response(normalised, ratio):
    log_ratio, options = RATIOS.log(), {"clip_low": 0.5, "clip_high": 0.5, "length_normalised": normalised}
    loss, low, high = clipped_sequence_loss(log_ratio, torch.zeros(1, 3), torch.ones(1, 3), ALL, **options)
    torch.testing.assert_close(loss, torch.full((1, 3), -ratio), rtol=0, atol=1e-4)
    assert not (low | high).any()


@pytest.mark.parametrize(("normalised", "slope"), [(True, 1 / 3), (False, 1.0)])
def test_the_gradient_of_a_response_ratio_is_shared_by_its_tokens(normalised, slope):
    """At ratio 1 the mean over the tokens falls by the advantage times the gradient of the (mean) log-probability."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    options = {"clip_low": 0.2, "clip_high": 0.2, "length_normalised": normalised}
    loss, _, _ = clipped_sequence_loss(logprobs, logprobs.detach(), torch.full((1, 3), 2.0), ALL, **options)
    (gradient,) = torch.autograd.grad(loss.mean(), logprobs)
    torch.testing.assert_close(gradient, torch.full((1, 3), -2.0 * slope))


@pytest.mark.parametrize(("advantage", "flags"), [(1.0, (False, True)), (-1.0, (False, False))])
def test_gspo_clips_whole_responses(advantage, flags):
    logprobs = RATIOS.log().requires_grad_()
    options = {"clip_low": 3e-4, "clip_high": 4e-4, "length_normalised": True}
    loss, low, high = clipped_sequence_loss(logprobs, torch.zeros(1, 3), torch.full((1, 3), advantage), ALL, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert (bool(low.all()), bool(high.all())) == flags
    assert bool((gradient == 0).all()) == flags[1]


@pytest.mark.parametrize(("ratio", "gradient", "high"), [(0.5, -1.0, False), (4.0, -8.0, False), (9.0, -10.0, True)])
def test_cispo_bounds_the_weight_and_keeps_the_gradient(ratio, gradient, high):
    loss, found, low, over = at(cispo_loss, ratio, 2.0, ratio_cap=5.0)
    assert found == pytest.approx(gradient, rel=1e-5)
    assert loss == pytest.approx(gradient * (math.log(ratio) - 2.0), rel=1e-5)
    assert (low, over) == (False, high)


def test_reinforce_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss, low, high = reinforce_loss(logprobs, torch.tensor([[2.0, -1.0, 7.0]]), mask)
    assert loss.tolist() == [[2.0, -2.0, 0.0]]
    assert torch.autograd.grad(loss.sum(), logprobs)[0].tolist() == [[-2.0, 1.0, 0.0]]
    assert not (low | high).any()


@pytest.mark.parametrize("function", [clipped_policy_loss, cispo_loss, reinforce_loss])
def test_on_policy_all_of_them_have_the_gradient_of_reinforce(function):
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = -torch.rand(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    mask = torch.arange(4) < torch.tensor([2, 4, 3])[:, None]
    options = {
        clipped_policy_loss: ((logprobs,), {"clip_low": 0.2, "clip_high": 0.2}),
        cispo_loss: ((logprobs,), {"ratio_cap": 5.0}),
        reinforce_loss: ((), {}),
    }
    leaf = logprobs.clone().requires_grad_()
    old, more = options[function]
    (gradient,) = torch.autograd.grad(function(leaf, *old, advantages, mask, **more).loss.sum(), leaf)
    torch.testing.assert_close(gradient, -advantages * mask)
