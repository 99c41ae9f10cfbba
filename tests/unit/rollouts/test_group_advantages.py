"""From scores to advantages without a critic, token by token against loops; the KL inside the reward."""

from dataclasses import replace

import pytest
import torch

from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.group_advantages import BatchMean, GreedyBaseline, GroupMean, LeaveOneOut, ReturnToGo

LENGTHS = [2, 4, 3, 1]
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
SCORES = torch.tensor([1.0, 9.0, -2.0, 0.5])
TRUNCATED = torch.tensor([False, True, False, False])
BETA = 0.3


def alone(x):
    return x


@pytest.fixture
def rollout():
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = (torch.randn(4, 4, generator=generator).masked_fill(~MASK, torch.nan) for _ in range(2))
    ids, zeros = torch.zeros(4, 6, dtype=torch.long), torch.zeros(4, 4)
    sequence = torch.cat([torch.zeros(4, 2, dtype=torch.bool), MASK], dim=1)
    groups, baselines = torch.tensor([0, 0, 1, 1]), torch.tensor([2.0, 2.0, -1.0, -1.0])
    before = (ids, sequence, sequence, MASK, TRUNCATED, logprobs, ref, zeros, zeros)
    return Rollout(*before, SCORES, groups, baselines, zeros, zeros)


def penalties(rollout):
    return [
        [BETA * float(rollout.logprobs[b, t] - rollout.ref_logprobs[b, t]) for t in range(n)]
        for b, n in enumerate(LENGTHS)
    ]


def whole(rollout, scores):
    """Score less the penalty of the response."""
    return [s - sum(p) for s, p in zip(scores, penalties(rollout), strict=True)]


def check(estimator, rollout, expected):
    found = estimator.estimate(rollout, kl_coef=BETA, all_sum=alone).advantages
    for b, n in enumerate(LENGTHS):
        assert found[b, :n].tolist() == pytest.approx([expected[b]] * n, abs=1e-5)
        assert found[b, n:].eq(0).all()


def test_leave_one_out(rollout):
    r = whole(rollout, SCORES.tolist())
    check(LeaveOneOut(), rollout, [r[0] - r[1], r[1] - r[0], r[2] - r[3], r[3] - r[2]])


def test_the_clip_and_the_penalty_of_what_has_no_end_come_first(rollout):
    r = whole(rollout, [1.0, 4.0 - 0.5, -2.0, 0.5])
    estimator = LeaveOneOut(missing_eos_penalty=0.5, score_clip=4.0)
    check(estimator, rollout, [r[0] - r[1], r[1] - r[0], r[2] - r[3], r[3] - r[2]])


def test_groups_without_a_scale(rollout):
    r = whole(rollout, SCORES.tolist())
    half = [(r[0] - r[1]) / 2, (r[2] - r[3]) / 2]
    check(GroupMean(scale="none"), rollout, [half[0], -half[0], half[1], -half[1]])


def test_groups_by_their_own_deviation(rollout):
    r = whole(rollout, SCORES.tolist())
    sign = [1 if r[0] > r[1] else -1, 1 if r[2] > r[3] else -1]
    found = GroupMean().estimate(rollout, kl_coef=BETA, all_sum=alone).advantages[:, 0]
    expected = torch.tensor([sign[0], -sign[0], sign[1], -sign[1]]) / 2**0.5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_the_mean_of_the_batch(rollout):
    r = whole(rollout, SCORES.tolist())
    check(BatchMean(), rollout, [x - sum(r) / 4 for x in r])


def test_the_greedy_response(rollout):
    r = whole(rollout, SCORES.tolist())
    check(GreedyBaseline(), rollout, [r[0] - 2, r[1] - 2, r[2] + 1, r[3] + 1])


@pytest.mark.parametrize("baseline", [False, True])
def test_what_follows_each_token(rollout, baseline):
    scores = [1 - 5, 9 - 5, -2 + 0.75, 0.5 + 0.75] if baseline else SCORES.tolist()
    estimator = ReturnToGo(group_baseline=baseline, whiten=False)
    found = estimator.estimate(rollout, kl_coef=BETA, all_sum=alone).advantages
    for b, (score, paid) in enumerate(zip(scores, penalties(rollout), strict=True)):
        expected = [score - sum(paid[t:]) for t in range(LENGTHS[b])]
        assert found[b, : LENGTHS[b]].tolist() == pytest.approx(expected, abs=1e-5)
    plain = found[MASK]
    white = replace(estimator, whiten=True).estimate(rollout, kl_coef=BETA, all_sum=alone).advantages
    torch.testing.assert_close(white[MASK], (plain - plain.mean()) / plain.std(), rtol=1e-4, atol=1e-5)
    assert white[~MASK].eq(0).all()
