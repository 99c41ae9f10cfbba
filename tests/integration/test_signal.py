"""Warnings about a run that learns nothing or diverges."""

import logging

import pytest
import torch

from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.guard import StepGuard
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.advantages import GAE
from rlhf_lightning.worlds import world_tokenizer
from tests.integration.test_iterations import fit, module_of, policy, sft  # noqa: F401
from tests.invariance.subjects import Memory


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


@pytest.mark.parametrize(
    ("norms", "warned"),
    [
        ([101.0] * 9 + [99.0] + [101.0] * 9, 0),
        ([101.0] * 10, 1),
        ([float("inf")] * 10, 1),  # a scaled step that the gradient scaler skips is no smaller
        ([101.0] * 30, 1),
        ([100.0] * 30, 0),
    ],
)
def test_a_gradient_that_stays_far_above_the_clip_is_warned_about(caplog, norms, warned):
    guard = StepGuard()
    with caplog.at_level(logging.WARNING):
        for step, norm in enumerate(norms):
            guard.watch(torch.tensor(norm), 1.0, step)
    assert caplog.text.count("diverges") == warned


@pytest.mark.parametrize("clip", [None, 0.0])
def test_without_a_clip_there_is_nothing_to_compare_with(caplog, clip):
    guard = StepGuard()
    for step in range(20):
        guard.watch(torch.tensor(1e9), clip, step)
    assert caplog.text == ""


@pytest.mark.parametrize(("algorithm", "warned"), [("norm", 1), ("value", 0)])
def test_offline_methods_warn_of_a_gradient_far_above_the_clip(tiny, tmp_path, caplog, algorithm, warned):
    clip = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": algorithm}
    with caplog.at_level(logging.WARNING):
        sft(tiny, tmp_path, max_steps=12, **clip)
    assert caplog.text.count("diverges") == warned


@pytest.mark.parametrize("method", ["ppo", "grpo", "online_dpo"])
def test_methods_that_sample_warn_of_a_gradient_far_above_the_clip(policy, tmp_path, caplog, method):  # noqa: F811
    sampling = SamplingParameters(
        max_new_tokens=16
    )  # long enough for an end: without one, no response is above another
    module = module_of(method, policy, iterations=11, sampling=sampling, minibatch_size=64)
    module.reward = module.scorer.reward = FunctionReward(
        lambda completion_ids: [float(sum(x)) for x in completion_ids]
    )
    object.__setattr__(module.update, "max_grad_norm", 1e-9)
    with caplog.at_level(logging.WARNING):
        fit(module, tmp_path, prompts=32)
    assert caplog.text.count("diverges") == 1


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_ppo_logs_the_gradient_norms_of_policy_and_critic_apart(policy, tmp_path, critic):  # noqa: F811
    module = module_of("ppo", policy, iterations=1, minibatch_size=64)  # one step
    if critic == "separate":
        network = load_scalar_model(policy, world_tokenizer(), new_head=True)
        module.critic_spec = ModelSpec(path=str(export_folder(network, world_tokenizer(), tmp_path / "critic")))
    memory = Memory()
    fit(module, tmp_path, logger=memory)
    row = memory.rows[0]
    whole = row["train/grad_norm/policy"] ** 2 + row["train/grad_norm/critic"] ** 2
    assert row["train/grad_norm"] ** 2 == pytest.approx(whole, rel=1e-5)
    assert row["train/grad_norm/policy"] > 0
    assert row["train/grad_norm/critic"] > 0
    assert row["train/grad_norm/critic"] != row["train/grad_norm/policy"]
