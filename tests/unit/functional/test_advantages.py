"""GAE against its definition written as a double sum, hand values, and what must not change it."""

import re

import pytest
import torch

from rlhf_lightning.functional.advantages import gae, whiten


def gae_by_definition(rewards, values, mask, gamma, gae_lambda):
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, one token at a time, in float64."""
    out = torch.zeros_like(rewards, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        length = int(mask[b].sum())
        value = [float(values[b, t]) for t in range(length)] + [0.0]
        delta = [float(rewards[b, t]) + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            out[b, t] = sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, length))
    return out


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 4, 7, 9])
    mask = torch.arange(9) < lengths[:, None]
    rewards, values = (torch.randn(4, 9, generator=generator) for _ in range(2))
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_the_discounted_sum_of_td_errors(batch, gamma, gae_lambda):
    advantages, _ = gae(*batch, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(advantages.double(), gae_by_definition(*batch, gamma, gae_lambda), rtol=1e-5, atol=1e-6)


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.3]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.43675, 0.565, 0.7]]))
    torch.testing.assert_close(returns, torch.tensor([[0.93675, 0.965, 1.0]]))


def test_lambda_one_returns_do_not_depend_on_the_critic(batch):
    rewards, values, mask = batch
    _, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    _, other = gae(rewards, 10 * values + 3, mask, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns, other, rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(batch):
    rewards, values, mask = batch
    clean = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    rewards, values = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, -1e6)
    dirty = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_whiten_counts_only_what_the_mask_counts(batch):
    _, values, mask = batch
    counted = whiten(values, mask)[mask]
    assert counted.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert counted.std().item() == pytest.approx(1.0, abs=1e-5)
    assert whiten(values, mask, keep_mean=True)[mask].mean().item() == pytest.approx(
        values[mask].mean().item(), abs=1e-6
    )


def test_slots_before_the_response_stay_zero_too():
    mask = torch.tensor([[False, False, True, True]])
    rewards, values = torch.tensor([[9.0, 9.0, 0.0, 1.0]]), torch.tensor([[9.0, 9.0, 0.5, 0.25]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    assert advantages.tolist() == [[0.0, 0.0, 0.125, 0.75]]
    assert returns.tolist() == [[0.0, 0.0, 0.625, 1.0]]


def test_one_token_is_worth_its_reward_less_its_value():
    advantages, returns = gae(
        torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[True]]), gamma=0.5, gae_lambda=0.5
    )
    assert (advantages.item(), returns.item()) == (2.0, 3.0)


def test_whitening_by_hand():
    whitened = whiten(torch.tensor([[0.43675, 0.565, 0.7]]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(whitened, torch.tensor([[-0.991344, -0.017092, 1.008436]]), rtol=0, atol=2e-6)


def test_whitening_two_values_divides_by_one_not_by_two():
    whitened = whiten(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 1.0]]) / 2**0.5)


@pytest.mark.parametrize("counted", [1, 3])
def test_what_does_not_vary_whitens_to_zero(counted):
    x, mask = torch.full((1, 3), 5.0), torch.arange(3)[None] < counted
    assert whiten(x, mask).tolist() == [[0.0, 0.0, 0.0]]
    assert whiten(x, mask, keep_mean=True).tolist() == (5.0 * mask).tolist()


def test_whitening_with_the_mean_kept_only_rescales():
    x, mask = torch.tensor([[3.0, 5.0, 9.0, 1e9]]), torch.tensor([[True, True, True, False]])
    kept = whiten(x, mask, keep_mean=True)
    mean, std = 17 / 3, (28 / 3) ** 0.5
    expected = torch.tensor([[*[(v - mean) / std + mean for v in (3.0, 5.0, 9.0)], 0.0]])
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("keep_mean", [False, True])
def test_two_ranks_whiten_as_one_with_both_their_batches(on_two_ranks, keep_mean):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(6) < torch.tensor([1, 6, 2, 5, 3])[:, None]
    x = torch.randn(5, 6, generator=generator) + torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0])[:, None]

    def work(rank, all_sum):
        rows = slice(0, 2) if rank == 0 else slice(2, 5)
        return whiten(x[rows], mask[rows], keep_mean=keep_mean, all_sum=all_sum)

    parts = on_two_ranks(work)
    torch.testing.assert_close(torch.cat(parts), whiten(x, mask, keep_mean=keep_mean), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_a_constant_on_score_and_critic_leaves_the_advantages(batch, gae_lambda):
    rewards, values, mask = batch
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1])
    plain, _ = gae(rewards, values, mask, gamma=1.0, gae_lambda=gae_lambda)
    lifted, returns = gae(rewards + 7 * last, values + 7, mask, gamma=1.0, gae_lambda=gae_lambda)
    torch.testing.assert_close(plain, lifted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, (plain + values + 7) * mask, rtol=1e-5, atol=1e-5)


def test_shapes_that_differ_are_refused():
    shapes = [(2, 3), (2, 4), (2, 3)], [(2, 3), (2, 3), (2, 4)], [(1, 3), (2, 3), (2, 3)]
    for rewards, values, mask in shapes:
        message = f"rewards {rewards}, values {values} and mask {mask} differ"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            gae(torch.zeros(rewards), torch.zeros(values), torch.ones(mask) > 0, gamma=1.0, gae_lambda=1.0)
