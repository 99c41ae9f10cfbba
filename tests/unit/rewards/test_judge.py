"""Win rates in a group from a judge of pairs: hand values, and what a judge may not say."""

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.judge import FunctionJudge, WinRateReward
from rlhf_lightning.rewards.reward import Samples


def samples(prompts, texts):
    return Samples(
        list(prompts), list(texts), [[1]] * len(texts), [False] * len(texts), {"row": list(range(len(texts)))}
    )


def test_both_orders_of_a_pair_are_averaged():
    asked = []

    def judge(prompts, first, second):
        asked.extend(zip(prompts, first, second, strict=True))
        return [0.8 if a == "x" else 0.3 for a in first]

    scores = WinRateReward(FunctionJudge(judge)).score(samples("qq", "xy"))
    assert asked == [("q", "x", "y"), ("q", "y", "x")]
    assert scores.tolist() == pytest.approx([(0.8 + 1 - 0.3) / 2, (1 - 0.8 + 0.3) / 2])


def test_a_judge_that_looks_at_places_alone_says_nothing():
    scores = WinRateReward(FunctionJudge(lambda prompts, first, second: [1.0] * len(first))).score(
        samples("qqq", "abc")
    )
    assert scores.tolist() == [0.5, 0.5, 0.5]


def test_groups_are_rows_side_by_side_with_one_prompt():
    better = lambda prompts, first, second: [float(a > b) for a, b in zip(first, second, strict=True)]  # noqa: E731
    scores = WinRateReward(FunctionJudge(better)).score(samples("ppprrsp", "bacxyzq"))
    assert scores.tolist() == [0.5, 0.0, 1.0, 0.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("answer", [[0.5], [0.5, 1.5], [0.5, float("nan")]])
def test_one_probability_a_pair(answer):
    reward = WinRateReward(FunctionJudge(lambda prompts, first, second: answer))
    with pytest.raises(UserError, match="one probability in \\[0, 1\\] a pair"):
        reward.score(samples("qq", "ab"))


def test_no_pairs_no_questions():
    def judge(**given):
        raise AssertionError(given)

    torch.testing.assert_close(WinRateReward(FunctionJudge(judge)).score(samples("ab", "xy")), torch.tensor([0.5, 0.5]))
