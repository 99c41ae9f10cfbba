"""Masks with holes: taking the masked tokens out of the rows must change nothing, whatever stands in their place."""

from functools import partial

import pytest
import torch

from rlhf_lightning.functional.advantages import gae, whiten
from rlhf_lightning.functional.aggregation import counts, token_weights
from rlhf_lightning.functional.groups import rewards_to_go
from rlhf_lightning.functional.language_model import nll_loss
from rlhf_lightning.functional.masked import last_true, masked_sum
from rlhf_lightning.functional.pair_tokens import desensitised_logprobs, mean_logprobs, on_policy_weights
from rlhf_lightning.functional.policy import (
    cispo_loss,
    clipped_policy_loss,
    clipped_sequence_loss,
    importance_weights,
    reinforce_loss,
)
from rlhf_lightning.functional.process import aggregate_steps, first_errors
from rlhf_lightning.functional.rewards import token_rewards
from rlhf_lightning.functional.value import clipped_value_loss, explained_variance
from rlhf_lightning.losses import PolicyObjective, PPOLoss

ROWS, LENGTH = 5, 9


def random_mask(seed):
    """A mask with holes anywhere, one True a row at least."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.2 + 0.6 * torch.rand(ROWS, 1, generator=generator)
    mask[torch.arange(ROWS), torch.randint(LENGTH, (ROWS,), generator=generator)] = True
    return mask


def packed_left(x, mask):
    """The counted entries of each row moved to the left, zeros after them."""
    order = (~mask).long().argsort(dim=1, stable=True)
    return x.masked_fill(~mask, 0).gather(1, order)


def ours(name):
    """Each function as f(mask, a, b, c, d) of per-token values."""
    step = {"clip_low": 0.2, "clip_high": 0.2}
    scores = torch.linspace(-1, 2, ROWS)
    shorter = torch.arange(ROWS) % 3 + 1
    objective = partial(PolicyObjective, "token_mean")
    return {
        "gae": lambda m, a, b, c, d: gae(a, b, m, gamma=0.9, gae_lambda=0.7),
        "gae, undiscounted": lambda m, a, b, c, d: gae(a, b, m, gamma=1.0, gae_lambda=1.0),
        "rewards_to_go": lambda m, a, b, c, d: rewards_to_go(a, m),
        "token_rewards": lambda m, a, b, c, d: token_rewards(scores, a, b, m, kl_coef=0.3),
        "whiten": lambda m, a, b, c, d: whiten(a, m),
        "whiten, mean kept": lambda m, a, b, c, d: whiten(a, m, keep_mean=True),
        "masked_sum": lambda m, a, b, c, d: masked_sum(a, m, dim=1),
        "reinforce": lambda m, a, b, c, d: reinforce_loss(a, c, m),
        "clipped": lambda m, a, b, c, d: clipped_policy_loss(a, b, c, m, **step, ratio_cap=3.0),
        "gspo": lambda m, a, b, c, d: clipped_sequence_loss(a, b, c, m, **step, length_normalised=True),
        "sequence": lambda m, a, b, c, d: clipped_sequence_loss(a, b, c, m, **step, length_normalised=False),
        "cispo": lambda m, a, b, c, d: cispo_loss(a, b, c, m, ratio_cap=1.5),
        "token weights": lambda m, a, b, c, d: importance_weights(a, b, m, cap=2.0, how="token_mask"),
        "sequence weights": lambda m, a, b, c, d: importance_weights(a, b, m, cap=2.0, how="sequence_truncate"),
        "value loss": lambda m, a, b, c, d: clipped_value_loss(a, b, c, m, clip_range=0.2),
        "explained variance": lambda m, a, b, c, d: explained_variance(a, b, m),
        "nll": lambda m, a, b, c, d: nll_loss(a, m),
        "mean_logprobs": lambda m, a, b, c, d: mean_logprobs(a, m),
        "desensitised": lambda m, a, b, c, d: desensitised_logprobs(a, m, shorter, alpha=0.3),
        "on-policy weights": lambda m, a, b, c, d: on_policy_weights(a, b, m),
        "k2 a response": lambda m, a, b, c, d: objective("loss_k2_sequence").kl_tokens(a - b, m),
        "k3 a token": lambda m, a, b, c, d: objective("loss_k3_token").kl_tokens(a - b, m),
        "ppo": lambda m, a, b, c, d: PPOLoss().policy(a, b, c, m) + PPOLoss().value(a, b, c, m),
        "step product": lambda m, a, b, c, d: aggregate_steps(a, m, "product"),
        "step minimum": lambda m, a, b, c, d: aggregate_steps(a, m, "minimum"),
        "last step": lambda m, a, b, c, d: aggregate_steps(a, m, "last"),
        "step mean": lambda m, a, b, c, d: aggregate_steps(a, m, "mean"),
        "first error": lambda m, a, b, c, d: first_errors(a, d, m)[1],
        **{
            how: lambda m, a, b, c, d, how=how: token_weights(m, how=how, total=counts(m), longest=20)
            for how in ("token_mean", "sequence_mean", "sequence_sum", "constant_length")
        },
    }[name]


NAMES = (
    "gae", "gae, undiscounted", "rewards_to_go", "token_rewards", "whiten", "whiten, mean kept", "masked_sum", "reinforce",
    "clipped", "gspo", "sequence", "cispo", "token weights", "sequence weights", "value loss", "explained variance", "nll",
    "mean_logprobs", "desensitised", "on-policy weights", "k2 a response", "k3 a token", "ppo", "step product",
    "step minimum", "last step", "step mean", "first error", "token_mean", "sequence_mean", "sequence_sum", "constant_length",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_taking_masked_tokens_out_changes_nothing(name):
    function = ours(name)
    for seed in range(40):
        mask = random_mask(seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        values = [torch.randn(ROWS, LENGTH, generator=generator) for _ in range(4)]
        values[3] = values[3].sigmoid()
        dense = packed_left(mask, mask)
        with_holes = function(mask, *(x.masked_fill(~mask, torch.nan) for x in values))
        without = function(dense, *(packed_left(x, mask) for x in values))
        pairs = (
            [(with_holes, without)] if isinstance(with_holes, torch.Tensor) else zip(with_holes, without, strict=True)
        )
        for found, expected in pairs:
            if found.shape == mask.shape:  # zero or False off the mask, but for weights, which are 1 there
                neutral = 1 if name.endswith("weights") else 0
                assert (found[~mask] == neutral).all(), (name, seed)
                found, expected = packed_left(found, mask), expected.masked_fill(~dense, 0)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_hole_inside_a_response_passes_the_reward_on_by_hand():
    mask = torch.tensor([[True, True, False, False, True, True]])
    rewards = torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.0, 1.0]])
    advantages, returns = gae(rewards, torch.zeros(1, 6), mask, gamma=1.0, gae_lambda=1.0)
    assert advantages.tolist() == returns.tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]


def test_nothing_is_discounted_across_a_hole_by_hand():
    mask = torch.tensor([[True, False, True]])
    advantages, returns = gae(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 7.0, 0.25]]), mask, gamma=0.5, gae_lambda=0.5
    )
    last = 1 - 0.25
    first = 0 + 0.5 * 0.25 - 0.5 + 0.25 * last
    torch.testing.assert_close(advantages, torch.tensor([[first, 0.0, last]]))
    torch.testing.assert_close(returns, torch.tensor([[first + 0.5, 0.0, 1.0]]))


def test_the_score_stands_on_the_last_token_that_counts():
    for seed in range(40):
        mask = random_mask(seed)
        zeros = torch.zeros(ROWS, LENGTH)
        rewards = token_rewards(torch.arange(1.0, ROWS + 1), zeros, zeros, mask, kl_coef=1.0)
        last = [max(t for t in range(LENGTH) if mask[row, t]) for row in range(ROWS)]
        assert last_true(mask).tolist() == last
        assert rewards.nonzero().tolist() == [[row, t] for row, t in enumerate(last)]
