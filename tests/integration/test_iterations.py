"""How long a run is and what its schedule counts: iterations for methods that sample, optimizer steps for the others."""

import logging

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning import cli
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import PolicyObjective, ReinforceLoss
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import GRPOModule, OnlineDPOModule, PPOModule, SFTModule
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.modules.ppo_update import PPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.group_advantages import LeaveOneOut
from rlhf_lightning.rollouts.kl_control import FixedKL
from rlhf_lightning.worlds import world_tokenizer
from tests.faults.faulty import Rows
from tests.invariance.subjects import Memory

PEAK = 1e-2
SHORT = SamplingParameters(max_new_tokens=3)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = load_causal_lm(ModelSpec(architecture={"model_type": "llama", **fields}), world_tokenizer())
    return ModelSpec(path=str(export_folder(network, world_tokenizer(), tmp_path_factory.mktemp("base") / "policy")))


def length(completions):
    return [float(len(c[0]["content"])) for c in completions]


def sgd(params):
    return torch.optim.SGD(params, lr=PEAK)


def module_of(method, policy, *, epochs=1, minibatch_size=4, target_kl=None, **settings):
    reward, shared = FunctionReward(length), {"sampling": SHORT, "optimizer": sgd, **settings}
    update = {"epochs": epochs, "minibatch_size": minibatch_size}
    if method == "ppo":
        return PPOModule(policy, None, reward, update=PPOUpdate(**update, target_kl=target_kl), **shared)
    if method == "online_dpo":
        return OnlineDPOModule(policy, reward, groups=Groups(size=2), update=GRPOUpdate(**update), **shared)
    objective = PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())
    update = GRPOUpdate(**update, target_kl=target_kl)
    return GRPOModule(policy, reward, LeaveOneOut(), objective, FixedKL(0), Groups(size=2), update=update, **shared)


def fit(module, folder, prompts=8, ckpt_path=None, **trainer):
    pl.seed_everything(0, verbose=False)
    memory = Memory()
    settings = {"accelerator": "cpu", "logger": memory, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0, "max_epochs": -1}
    runner = pl.Trainer(**settings | trainer)
    runner.fit(module, PromptDataModule(Rows(), batch_size=prompts, split=Split(validation=0)), ckpt_path=ckpt_path)
    return runner, [row["train/learning_rate"] / PEAK for row in memory.rows if "train/learning_rate" in row]


@pytest.mark.parametrize("method", ["ppo", "grpo", "online_dpo"])
def test_iterations_end_a_run_and_are_what_the_schedule_counts(policy, tmp_path, method):
    """Also where the KL stops each of them after its first step of four."""
    early = {} if method == "online_dpo" else {"target_kl": 1e-12, "epochs": 4, "minibatch_size": 16}
    module = module_of(method, policy, iterations=5, **early)
    runner, rates = fit(module, tmp_path)
    assert module.iteration == 5
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert runner.global_step < 5 * 4 if early else runner.global_step == 5 * 4


@pytest.mark.parametrize(
    ("max_steps", "iterations"),
    [(14, 5), (16, 6), (3, 1), (4, 2), (8, 3)],  # iterations of 3, 3 and 2 steps, for 12, 12 and 8 prompts
)
def test_iterations_are_planned_from_the_steps_that_batches_really_take(policy, tmp_path, max_steps, iterations):
    _, rates = fit(module_of("ppo", policy), tmp_path, prompts=12, max_steps=max_steps)
    assert rates == pytest.approx([1 - i / iterations for i in range(iterations)])


@pytest.mark.parametrize(("method", "steps"), [("grpo", [6, 6, 4]), ("online_dpo", [6, 6, 4])])
def test_rows_of_groups_and_pairs_are_counted(policy, tmp_path, method, steps):
    _, rates = fit(module_of(method, policy), tmp_path, prompts=12, max_steps=sum(steps) + steps[0])
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_an_early_stop_by_kl_adds_no_iterations_at_rate_zero(policy, tmp_path, method):
    """max_steps is a number of iterations; those that stop early are not made up for."""
    module = module_of(method, policy, target_kl=1e-12, epochs=4, minibatch_size=16)
    _, rates = fit(module, tmp_path, max_steps=16)  # four steps an iteration at most
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_the_smallest_limit_ends_the_run(policy, tmp_path):
    _, rates = fit(module_of("ppo", policy, iterations=3), tmp_path, max_epochs=2, max_steps=100)
    assert rates == pytest.approx([1, 2 / 3, 1 / 3])
    _, rates = fit(module_of("ppo", policy, iterations=30), tmp_path, max_epochs=1)  # four batches of 8 prompts
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])
    _, rates = fit(module_of("ppo", policy, iterations=30), tmp_path, max_epochs=2, limit_train_batches=1)
    assert rates == pytest.approx([1.0, 0.5])


class StopAfter(pl.Callback):
    """Ends a run that has no end of its own."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.fit_loop.epoch_loop.total_batch_idx + 1 >= self.batches


@pytest.mark.parametrize("limit", [{}, {"max_time": {"minutes": 9}}, {"max_time": {"minutes": 9}, "max_epochs": None}])
def test_without_a_known_end_the_rate_stays_constant_after_the_warm_up(policy, tmp_path, caplog, limit):
    module = module_of("ppo", policy, schedule=Schedule(warmup=1, decay="cosine"))
    with caplog.at_level(logging.WARNING):
        _, rates = fit(module, tmp_path, callbacks=[StopAfter(4)], **limit)
    assert rates == [0.5, 1.0, 1.0, 1.0]
    assert "stays constant" in caplog.text
    assert "iterations" in caplog.text


def sft(tiny, folder, ckpt_path=None, schedule=None, lr=PEAK, **trainer):
    pl.seed_everything(0, verbose=False)
    module = SFTModule(
        ModelSpec(architecture=tiny),
        optimizer=lambda params: torch.optim.SGD(params, lr=lr),
        schedule=schedule or Schedule(),
    )
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}
    settings |= {"enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0}
    memory = Memory()
    runner = pl.Trainer(logger=memory, log_every_n_steps=1, **settings | trainer)
    data = DemonstrationDataModule(Rows(), batch_size=8, split=Split(validation=0))
    runner.fit(module, data, ckpt_path=ckpt_path)
    rows = [row["train/learning_rate"] / PEAK for row in memory.rows if "train/learning_rate" in row]
    return runner, rows


def test_offline_runs_without_a_known_end_keep_a_constant_rate(tiny, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, rates = sft(tiny, tmp_path, callbacks=[StopAfter(5)])
    assert rates == [1.0] * 5
    assert "stays constant" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sft(tiny, tmp_path, callbacks=[StopAfter(1)], schedule=Schedule(decay="constant"))
    assert "stays constant" not in caplog.text


def test_a_resumed_offline_run_follows_the_schedule_of_its_new_length(tiny, tmp_path):
    """Sixteen rows, two steps an epoch: at step 4 the old plan is at 0, that of eight steps at a half."""
    runner, rates = sft(tiny, tmp_path, max_epochs=2)
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])
    runner.save_checkpoint(tmp_path / "last.ckpt")
    _, rates = sft(tiny, tmp_path, tmp_path / "last.ckpt", max_epochs=4)
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_a_resumed_run_has_the_rate_and_the_schedule_that_it_is_given(tiny, tmp_path):
    runner, _ = sft(tiny, tmp_path, max_epochs=2)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    schedule = Schedule(decay="constant")
    _, rates = sft(tiny, tmp_path, tmp_path / "last.ckpt", schedule, lr=3 * PEAK, max_epochs=3)
    assert rates == pytest.approx([3.0, 3.0])


def test_a_resumed_online_run_follows_the_schedule_of_its_new_length(policy, tmp_path):
    runner, rates = fit(module_of("ppo", policy, iterations=2), tmp_path)
    assert rates == pytest.approx([1.0, 0.5])
    runner.save_checkpoint(tmp_path / "last.ckpt")
    _, rates = fit(module_of("ppo", policy, iterations=2), tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert rates == []  # they are done
    module = module_of("ppo", policy, iterations=4)
    _, rates = fit(module, tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert rates == pytest.approx([0.5, 0.25])
    assert module.iteration == 4


def test_fewer_than_one_iteration_is_refused(policy):
    with pytest.raises(UserError, match="iterations is at least 1, not 0"):
        module_of("ppo", policy, iterations=0)


def test_iterations_on_the_command_line(policy, tmp_path):
    """More than one epoch of them, and no other limit is asked for."""
    folder = tmp_path / "run"
    reward = tmp_path / "length_of.py"
    reward.write_text("def length(completions):\n    return [float(len(c[0]['content'])) for c in completions]\n")
    arguments = [
        "fit", "--import", str(reward), "--model", "PPOModule", "--model.policy.path", policy.path, "--model.critic", "null",
        "--model.reward", "FunctionReward", "--model.reward.function", f"{reward}:length", "--model.iterations", "3",
        "--model.sampling.max_new_tokens", "3", "--data", "PromptDataModule", "--data.source", "HHHWorld",
        "--data.source.prompts", "16", "--data.batch_size", "8", "--trainer.accelerator", "cpu", "--wandb", "disabled",
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(folder), "--trainer.limit_val_batches", "0",
    ]  # fmt: skip
    cli.main(arguments)
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    assert [float(line.split(",")[names.index("train/iteration")]) for line in lines[1:]] == [1, 2, 3]
