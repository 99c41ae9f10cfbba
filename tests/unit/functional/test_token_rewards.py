"""Token rewards, the missing-EOS rule and the adaptive KL coefficient."""

import pytest
import torch

from rlhf_lightning.functional.rewards import adaptive_kl_coef, process_scores, token_rewards

MASK = torch.arange(4) < torch.tensor([1, 3, 4])[:, None]


def test_token_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [-1.0, -2.0, -3.0, 0.0], [-1.0, -1.0, -1.0, -4.0]])
    ref = torch.tensor([[-3.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, 0.0], [-2.0, -1.0, 0.0, -1.0]])
    rewards = token_rewards(torch.tensor([5.0, -7.0, 0.5]), logprobs, ref, MASK, kl_coef=0.1)
    expected = [[4.8, 0, 0, 0], [0, 0.1, -7 + 0.2, 0], [-0.1, 0, 0.1, 0.5 + 0.3]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_token_rewards_sum_to_the_score_minus_the_weighted_kl():
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = (-torch.rand(3, 4, generator=generator) for _ in range(2))
    scores = torch.tensor([1.0, -2.0, 3.0])
    rewards = token_rewards(scores, logprobs, ref, MASK, kl_coef=0.3)
    for b in range(3):
        kl = sum(float(logprobs[b, t] - ref[b, t]) for t in range(4) if MASK[b, t])
        assert rewards[b].sum().item() == pytest.approx(float(scores[b]) - 0.3 * kl, rel=1e-5)
    assert rewards[~MASK].eq(0).all()


def test_without_kl_only_the_last_token_is_rewarded():
    noise = torch.rand(3, 4)
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), noise, -noise, MASK, kl_coef=0.0)
    assert rewards.tolist() == [[1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_of_another_precision_are_added_in_that_of_the_log_probabilities(dtype):
    rewards = token_rewards(
        torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.zeros(3, 4), torch.zeros(3, 4), MASK, kl_coef=1
    )
    assert rewards.dtype == torch.float32
    assert rewards.sum(1).tolist() == [1, 2, 3]


def test_nan_in_the_padding_does_not_reach_the_rewards():
    logprobs = torch.zeros(3, 4).masked_fill(~MASK, torch.nan)
    rewards = token_rewards(torch.ones(3), logprobs, torch.zeros(3, 4), MASK, kl_coef=0.1)
    assert rewards.sum(1).tolist() == [1, 1, 1]


def test_the_score_is_clipped_first_and_then_penalised_where_eos_is_missing():
    scores, truncated = torch.tensor([12.0, 12.0, -12.0, -12.0, 3.0, 3.0]), torch.tensor([True, False] * 3)
    processed = process_scores(scores, truncated, missing_eos_penalty=1.5, clip=10.0)
    assert processed.tolist() == [8.5, 10.0, -11.5, -10.0, 1.5, 3.0]
    unclipped = process_scores(scores, truncated, missing_eos_penalty=1.5, clip=None)
    assert unclipped.tolist() == [10.5, 12.0, -13.5, -12.0, 1.5, 3.0]
    exact = process_scores(scores.double(), truncated, missing_eos_penalty=0.1, clip=None)
    assert exact.tolist() == [11.9, 12.0, -12.1, -12.0, 2.9, 3.0]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.150768),
        (5.5, 0.14968),
        (6.0, 0.15),
        (1e6, 0.150768),
        (0.0, 0.149232),
        (-3.0, 0.149232),
        (6.6, 0.150384),
    ],
)
def test_the_coefficient_moves_by_at_most_a_fifth_of_the_horizon(kl, expected):
    coef = adaptive_kl_coef(0.15, kl, target=6.0, horizon=10_000, episodes=256)
    assert coef == pytest.approx(expected, abs=1e-9)


def test_a_controller_held_at_twice_the_target_grows_by_a_fifth_a_horizon():
    coef = 0.15
    for _ in range(100):
        coef = adaptive_kl_coef(coef, 12.0, target=6.0, horizon=10_000, episodes=100)
    assert coef == pytest.approx(0.15 * 1.002**100)
