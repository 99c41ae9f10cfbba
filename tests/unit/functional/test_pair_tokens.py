"""What is made of tokens before a loss, token by token in a loop."""

import math

import pytest
import torch

from rlhf_lightning.functional.pair_tokens import desensitised_logprobs, mean_logprobs, on_policy_weights

NAN = math.nan
LOGPROBS = torch.tensor([[NAN, -1.0, -2.0, NAN, NAN], [-0.5, -0.25, -1.0, -3.0, NAN]])
MASK = ~LOGPROBS.isnan()
TOKENS = [[x for x in row if not math.isnan(x)] for row in LOGPROBS.tolist()]


def test_means_are_over_the_tokens_that_count():
    assert mean_logprobs(LOGPROBS, MASK).tolist() == pytest.approx([sum(t) / len(t) for t in TOKENS])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tokens_beyond_the_shorter_response_count_alpha(alpha):
    found = desensitised_logprobs(LOGPROBS, MASK, torch.tensor([2, 2]), alpha=alpha)
    expected = [sum(x if t < 2 else alpha * x for t, x in enumerate(row)) for row in TOKENS]
    assert found.tolist() == pytest.approx(expected)


def test_weights_are_one_for_the_likely_and_less_for_the_strange():
    """Of a coin, every token agrees as two draws would; of (.8, .2) the unlikely one is e^log(.2 / .68)."""
    coin, biased = math.log(0.5), math.log(0.8**2 + 0.2**2)
    logprobs = torch.tensor([[coin, coin, NAN], [math.log(0.8), math.log(0.2), NAN]], requires_grad=True)
    collisions = torch.tensor([[coin, coin, NAN], [biased, biased, NAN]])
    weights = on_policy_weights(logprobs, collisions, ~logprobs.isnan())
    assert weights.tolist() == pytest.approx([1.0, math.sqrt(0.8 / 0.68 * 0.2 / 0.68)])
    assert not weights.requires_grad


def test_what_is_masked_has_no_gradient():
    leaf = LOGPROBS.clone().requires_grad_()
    for value in (mean_logprobs(leaf, MASK), desensitised_logprobs(leaf, MASK, torch.tensor([2, 2]), alpha=0.5)):
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert gradient.isfinite().all()
        assert (gradient[~MASK] == 0).all()
