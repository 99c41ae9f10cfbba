"""Tiny problems in which something fails at a chosen moment."""

import lightning.pytorch as pl
import torch
from datasets import DatasetDict

from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.modules.ppo import PPOUpdate
from rlhf_lightning.rewards.failures import RewardFailures
from rlhf_lightning.rollouts.kl_control import AdaptiveKL
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

WORLD = HHHWorld(seed=0, demonstrations=16, preferences=16, prompts=32, held_out=8)


class Rows(Source):
    """Rows of the world, the training ones alone or with a few held-out ones."""

    def __init__(self, held_out: bool = False):
        self.held_out = held_out

    def __str__(self):
        return "the rows"

    def load(self, kind):
        rows = WORLD.load(kind)
        return DatasetDict(train=rows["train"], **({"validation": rows["validation"]} if self.held_out else {}))

    def tokenizer(self):
        return world_tokenizer()


def ppo(base, reward, **failures):
    """PPO with everything that a skipped iteration must not touch: a schedule, an adaptive KL, several minibatches."""
    return PPOModule(
        ModelSpec(path=str(base / "policy")),
        None,
        reward,
        kl=AdaptiveKL(init=0.1, target=1e-4, horizon=8),
        sampling=SamplingParameters(max_new_tokens=4),
        update=PPOUpdate(epochs=1, minibatch_size=4, reward_failures=RewardFailures(**failures)),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    )


def prompts(held_out: bool = False) -> PromptDataModule:
    return PromptDataModule(Rows(held_out), batch_size=8, split=Split(validation=0))


def fit(module, data, folder, **trainer):
    pl.seed_everything(0, verbose=False)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0}
    runner = pl.Trainer(**settings | trainer)
    runner.fit(module, datamodule=data)
    return runner


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items() if "_means" not in name}
