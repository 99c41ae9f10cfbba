"""Baselines over groups: hand values, and what must not matter."""

import pytest
import torch

from rlhf_lightning.functional.groups import (
    batch_mean,
    group_advantages,
    group_mean,
    group_std,
    leave_one_out_advantages,
    rewards_to_go,
    without_signal,
)

FOUR = torch.tensor([1.0, 2.0, 3.0, 6.0])
ONE_GROUP = torch.zeros(4, dtype=torch.long)
TWO_GROUPS = torch.tensor([7, 3, 7, 3, 3])  # neither side by side nor counted from zero


def alone(x):
    return x


def grpo(rewards, groups=ONE_GROUP, scale="group"):
    return group_advantages(rewards, groups, scale=scale, all_sum=alone)


def test_leave_one_out_by_hand():
    found = leave_one_out_advantages(FOUR, ONE_GROUP)
    torch.testing.assert_close(found, torch.tensor([-8 / 3, -4 / 3, 0.0, 4.0]), rtol=0, atol=1e-6)


def test_leave_one_out_is_each_against_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 4.0, 3.0, 0.0, 5.0])
    expected = [1 - 3, 4 - (0 + 5) / 2, 3 - 1, 0 - (4 + 5) / 2, 5 - (4 + 0) / 2]
    torch.testing.assert_close(leave_one_out_advantages(rewards, TWO_GROUPS), torch.tensor(expected))
    shifted = leave_one_out_advantages(rewards + 10 * TWO_GROUPS, TWO_GROUPS)
    torch.testing.assert_close(shifted, torch.tensor(expected), atol=1e-5, rtol=0)


def test_groups_by_hand():
    torch.testing.assert_close(grpo(FOUR), torch.tensor([-0.925777, -0.462889, 0.0, 1.388666]), rtol=0, atol=1e-6)
    binary = grpo(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(binary, torch.tensor([1.4997, -0.4999, -0.4999, -0.4999]), rtol=0, atol=1e-4)
    two = grpo(torch.tensor([5.0, -3.0]), torch.tensor([1, 1]))
    torch.testing.assert_close(two, torch.tensor([0.7071, -0.7071]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_whose_deviation_divides(scale):
    rewards, groups = torch.tensor([0.0, 2.0, 4.0, -1.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 5, 5, 5])
    centred = torch.tensor([-2.0, 0.0, 2.0, -1.0, 0.0, 1.0])
    squares = sum((r - 1) ** 2 for r in rewards.tolist())  # the mean of all is 1
    divisor = {
        "none": torch.ones(6),
        "group": torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 1.0]) + 1e-4,
        "batch": torch.full((6,), (squares / 5) ** 0.5 + 1e-4),
    }
    torch.testing.assert_close(grpo(rewards, groups, scale), centred / divisor[scale])


def test_the_batch_is_that_of_all_ranks():
    """Two ranks of two responses each, by a sum that knows the other's part."""
    mine, other = torch.tensor([1.0, 3.0]), torch.tensor([10.0, 6.0])
    answers = iter([torch.tensor(2.0), other.sum(), torch.tensor(2.0), ((other - 5.0) ** 2).sum()])

    def both(x):
        return x + next(answers)

    found = group_advantages(mine, torch.zeros(2), scale="batch", all_sum=both)
    deviation = torch.cat([mine, other]).std()
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0]) / (deviation + 1e-4))
    assert batch_mean(mine, lambda x: 2 * x) == 2.0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e6])
def test_a_group_that_agrees_gets_exactly_nothing(scale, value):
    rewards = torch.tensor([value, 1.0, value, 2.0, 4.0])
    found = grpo(rewards, TWO_GROUPS, scale)
    assert found[[0, 2]].tolist() == [0.0, 0.0]
    assert found[[1, 3, 4]].abs().min() > 0
    assert without_signal(rewards, TWO_GROUPS).tolist() == [True, False, True, False, False]


def test_invariances():
    generator = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(24, generator=generator), torch.arange(24) // 6
    scaled = grpo(3 * rewards + 5, groups)
    torch.testing.assert_close(scaled, grpo(rewards, groups), rtol=1e-3, atol=1e-4)  # but for the 1e-4 in the divisor
    order = torch.randperm(24, generator=generator)
    for function in (grpo, leave_one_out_advantages):
        torch.testing.assert_close(function(rewards[order], groups[order]), function(rewards, groups)[order])
        assert group_mean(function(rewards, groups), groups).abs().max() < 1e-6


def test_mean_and_deviation_of_groups_against_a_loop():
    values = torch.randn(5, generator=torch.Generator().manual_seed(2))
    for group in (3, 7):
        rows = group == TWO_GROUPS
        torch.testing.assert_close(group_mean(values, TWO_GROUPS)[rows], values[rows].mean().expand(rows.sum()))
        torch.testing.assert_close(group_std(values, TWO_GROUPS)[rows], values[rows].std().expand(rows.sum()))


def test_rewards_to_go_by_hand_and_across_a_hole():
    rewards = torch.tensor([[-0.1, -0.2, 0.7], [1.0, torch.nan, 2.0]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    torch.testing.assert_close(rewards_to_go(rewards, mask), torch.tensor([[0.4, 0.5, 0.7], [3.0, 0.0, 2.0]]))
