"""A mixture of experts under a real Trainer: the auxiliary loss of its routers is in every optimizer step of every method."""

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import PolicyObjective
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import (
    DPOModule,
    GRPOModule,
    KTOModule,
    OnlineDPOModule,
    PPOModule,
    RewardModelModule,
    SFTModule,
    guard,
)
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.modules.ppo import PPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.group_advantages import GroupMean
from rlhf_lightning.rollouts.kl_control import FixedKL
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

WORLD = HHHWorld(seed=0, demonstrations=8, preferences=8, prompts=8, held_out=8, unpaired=8)
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}
COEFFICIENT = 1000.0  # beside it, the rest of the gradient does not count


def lengths(completions):
    return [float(len(c[0]["content"]) % 7) for c in completions]


def sgd(params):
    return torch.optim.SGD(params, lr=1e-3)


def online(**more):
    return {
        "reward": FunctionReward(lengths),
        "sampling": SamplingParameters(max_new_tokens=4),
        "optimizer": sgd,
        "schedule": Schedule(decay="constant"),
        **more,
    }


def methods(spec):
    """A module, its data, and how many micro-batches share a step."""
    halves = GRPOUpdate(minibatch_size=16, micro_batch_size=8)
    part = {"batch_size": 8, "split": Split(validation=0)}
    constant = {"optimizer": sgd, "schedule": Schedule(decay="constant")}
    prompts = lambda: PromptDataModule(WORLD, **part)  # noqa: E731
    return {
        "sft": lambda: (SFTModule(spec, **constant), DemonstrationDataModule(WORLD, **part), 1),
        "reward": lambda: (RewardModelModule(spec, **constant), PreferenceDataModule(WORLD, **part), 1),
        "dpo": lambda: (DPOModule(spec, **constant), PreferenceDataModule(WORLD, **part), 1),
        "kto": lambda: (KTOModule(spec, **constant), UnpairedDataModule(WORLD, **part), 1),
        "ppo": lambda: (
            PPOModule(
                spec,
                None,
                kl=FixedKL(0.0),
                update=PPOUpdate(epochs=1, minibatch_size=8, micro_batch_size=4),
                **online(),
            ),
            prompts(),
            2,
        ),
        "grpo": lambda: (
            GRPOModule(
                spec,
                advantages=GroupMean(),
                objective=PolicyObjective(aggregation="token_mean", kl_placement="reward_k1"),
                kl=FixedKL(0.0),
                groups=Groups(size=2),
                update=halves,
                **online(),
            ),
            prompts(),
            2,
        ),
        "online_dpo": lambda: (
            OnlineDPOModule(spec, groups=Groups(size=2), update=halves, **online()),
            prompts(),
            2,
        ),
    }


@pytest.fixture
def spec(tmp_path):
    torch.manual_seed(0)
    network = load_causal_lm(ModelSpec(architecture=MIXTRAL), world_tokenizer())
    with torch.no_grad():
        network.model.layers[0].mlp.gate.weight.normal_(std=0.5)
    path = str(export_folder(network, world_tokenizer(), tmp_path / "base"))
    return ModelSpec(path=path, router_aux_loss_coef=COEFFICIENT)


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "kto", "ppo", "grpo", "online_dpo"])
def test_a_step_has_the_mean_auxiliary_loss_of_its_micro_batches(method, spec, tmp_path, monkeypatch):
    module, data, parts = methods(spec)[method]()
    taken, differentiated = [], []
    take, saw = guard.take_router_loss, module.guard.saw
    monkeypatch.setattr(guard, "take_router_loss", lambda m: taken.append(take(m)) or taken[-1])
    module.guard.saw = lambda batch, loss: differentiated.append(loss.detach()) or saw(batch, loss)
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        max_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    assert len(taken) == len(differentiated) == parts
    assert all(loss is not None for loss in taken)
    auxiliary = torch.stack(taken).mean()
    assert auxiliary > 0.9 * COEFFICIENT
    torch.testing.assert_close(torch.stack(differentiated).sum(), auxiliary.detach(), rtol=0.02, atol=0)
