"""Warnings about a run that learns nothing or diverges."""

import logging

import pytest

from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.advantages import GAE
from tests.integration.test_iterations import SHORT, fit, module_of, policy, sft  # noqa: F401


@pytest.mark.parametrize("constant", [True, False])
def test_ppo_warns_once_of_a_reward_that_says_nothing_and_counts_it(policy, tmp_path, caplog, constant):  # noqa: F811
    """0.3 has no exact square: a variance from sums would not be 0."""
    module = module_of("ppo", policy, iterations=3)
    rewards = {
        True: lambda prompts: [0.3] * len(prompts),
        False: lambda completion_ids: [float(x[0]) for x in completion_ids],
    }
    module.reward = module.scorer.reward = FunctionReward(rewards[constant])
    module.advantages = GAE(missing_eos_penalty=0.0)
    with caplog.at_level(logging.WARNING):
        fit(module, tmp_path)
    assert module.without_signal == (3 if constant else 0)
    assert caplog.text.count("nothing is learnt") == constant


def test_ppo_judges_the_scores_that_advantages_are_made_of(policy, tmp_path, caplog):  # noqa: F811
    module = module_of("ppo", policy, iterations=1)
    module.reward = module.scorer.reward = FunctionReward(lambda completion_ids: [1.0 + x[0] for x in completion_ids])
    module.advantages = GAE(missing_eos_penalty=0.0, score_clip=1.0)
    with caplog.at_level(logging.WARNING):
        fit(module, tmp_path)
    assert "nothing is learnt" in caplog.text
