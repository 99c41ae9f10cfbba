"""A reward that depends on the prompt alone teaches nothing, where every response is compared with others to its prompt."""

import pytest
import torch

from rlhf_lightning.losses import PolicyObjective, ReinforceLoss
from rlhf_lightning.modules import GRPOModule, OnlineDPOModule
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.group_advantages import BatchMean, GreedyBaseline, GroupMean, LeaveOneOut, ReturnToGo
from rlhf_lightning.rollouts.kl_control import FixedKL
from tests.integration.test_iterations import SHORT, Memory, fit, policy, sgd  # noqa: F401

SIZE = 3
COMPARE = {
    "leave one out": LeaveOneOut(),
    "group mean": GroupMean(),
    "group mean, no scale": GroupMean(scale="none"),
    "greedy": GreedyBaseline(),
    "return to go": ReturnToGo(group_baseline=True, whiten=False),
    "batch mean": BatchMean(),
}


def of_prompt(prompts, completions):
    return [float(sum(map(ord, prompt[-1]["content"])) % 97) for prompt in prompts]


def logged(module, folder):
    """What the only iteration logs, on five prompts."""
    memory = Memory()
    fit(module, folder, prompts=5, logger=memory)
    return next(row for row in memory.rows if "train/grad_norm" in row)


@pytest.mark.parametrize("name", COMPARE)
def test_a_group_method_learns_nothing(policy, tmp_path, name):  # noqa: F811
    module = GRPOModule(
        policy,
        FunctionReward(of_prompt),
        COMPARE[name],
        PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss()),
        FixedKL(0),
        Groups(size=SIZE),
        sampling=SHORT,
        optimizer=sgd,
        update=GRPOUpdate(minibatch_size=6, micro_batch_size=4),
        iterations=1,
    )
    row = logged(module, tmp_path)
    if name == "batch mean":  # which compares prompts with each other
        assert row["train/grad_norm"] > 1
    else:
        assert row["train/grad_norm"] == 0
    scores = module.drawn.scores.view(-1, SIZE)
    assert len(scores) == 5
    assert len(set(scores[:, 0].tolist())) == 5
    assert torch.equal(scores, scores[:, :1].expand(5, SIZE))


def test_online_dpo_learns_nothing(policy, tmp_path):  # noqa: F811
    update = GRPOUpdate(minibatch_size=6, micro_batch_size=4)
    arguments = {"groups": Groups(size=SIZE), "sampling": SHORT, "optimizer": sgd, "update": update, "iterations": 1}
    row = logged(OnlineDPOModule(policy, FunctionReward(of_prompt), **arguments), tmp_path)
    assert row["train/frac_reward_zero_std"] == 1
    assert row["train/grad_norm"] == 0
