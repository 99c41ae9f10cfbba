"""No policy, trained or not, has more reward than the best that its KL can buy: above the frontier there are only bugs."""

from dataclasses import asdict
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from enumeration import perturb

from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.evaluation.exact import Target, policy_logps
from rlhf_lightning.evaluation.ground_truth import OptimumCurve
from rlhf_lightning.functional.optimum import kl_optimum
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import DPOLoss, IPOLoss
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule, PPOModule
from rlhf_lightning.modules.ppo import PPOUpdate
from rlhf_lightning.rewards.enumerable import EnumerableReward
from rlhf_lightning.rollouts.advantages import GAE
from rlhf_lightning.rollouts.kl_control import FixedKL

TOLERANCE = 1e-3


def assert_below(point):
    assert point["reward"] <= point["frontier_reward"] + TOLERANCE


def module_of(name, world, folder):
    optimizer = partial(torch.optim.Adam, lr=4e-3)
    if name != "PPO":
        return DPOModule(ModelSpec(path=folder), {"DPO": DPOLoss(0.2), "IPO": IPOLoss(0.1)}[name], optimizer=optimizer)
    return PPOModule(
        ModelSpec(path=folder),
        None,
        EnumerableReward(world),
        kl=FixedKL(0.2),
        sampling=SamplingParameters(world.max_new_tokens),
        advantages=GAE(gae_lambda=1.0, missing_eos_penalty=0.0),
        update=PPOUpdate(epochs=2),
        optimizer=optimizer,
    )


@pytest.mark.parametrize("name", ["PPO", "DPO", "IPO"])
def test_no_point_of_a_training_lies_above_the_frontier(world, folder, tmp_path, name):
    pl.seed_everything(0, verbose=False)
    curve = OptimumCurve(every_n_batches=2)
    data = PromptDataModule(world, batch_size=8) if name == "PPO" else PreferenceDataModule(world, batch_size=64)
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    settings |= {"enable_checkpointing": False, "default_root_dir": tmp_path, "callbacks": [curve], "max_epochs": -1}
    pl.Trainer(accelerator="cpu", max_steps=40, **settings).fit(module_of(name, world, folder), datamodule=data)
    for point in curve.points:
        assert_below(point)
    first, last = curve.points[0], curve.points[-1]
    assert (first["step"], last["step"]) == (0, 40)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["lost_percent"] == pytest.approx(100, abs=0.01)
    assert last["kl"] > 0.05  # it went somewhere
    assert last["reward"] > first["reward"] + 0.1


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_no_perturbed_policy_lies_above_the_frontier(world, noise):
    target = Target("PPO", world.ref_logps, world.rewards, beta=1.0)
    for seed in range(5):
        policy = PolicyNetwork(world.reference())
        perturb(policy, noise, seed)
        with torch.no_grad():
            assert_below(asdict(target.exact(policy_logps(policy, world))))


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_of_any_beta_lies_on_it(world, beta):
    target = Target("PPO", world.ref_logps, world.rewards, beta=1.0)
    point = target.exact(kl_optimum(world.ref_logps, world.rewards, beta=beta)[0])
    assert point.reward == pytest.approx(point.frontier_reward, abs=1e-9)


def test_a_reward_that_was_read_off_another_response_lies_above_it(world):
    """What the check is for: a reward table shifted by one response promises what no policy has."""
    target = Target("PPO", world.ref_logps, world.rewards, beta=1.0)
    best = kl_optimum(world.ref_logps, world.rewards, beta=0.5)[0]
    claimed = Target("PPO", world.ref_logps, world.rewards + 0.1, beta=1.0).exact(best).reward
    assert claimed > target.exact(best).frontier_reward + TOLERANCE
