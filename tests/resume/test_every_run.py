"""A run of every method on the command line: its learning rates, its KL coefficients, and validations that leave no trace."""

import csv
import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rlhf_lightning import cli, modules
from rlhf_lightning.callbacks import checkpoint_file
from tests.resume import runs

PEAK, CRITIC = 0.003, 0.006
# Eight steps or iterations, three of warm-up, and a cosine from 1 to 0.1 over the other five: .1 + .9 (1 + cos(k pi / 5)) / 2.
RATES = [0.25, 0.5, 0.75, 1.0, 0.9140577, 0.6890577, 0.4109424, 0.1859424]
SCHEDULE = ["--model.schedule.warmup", "3", "--model.schedule.decay", "cosine", "--model.schedule.final", "0.1"]
# Seven batches an epoch, of which two make a step: four steps, the last one short. Two epochs.
ROWS = {
    "sft": "demonstrations",
    "reward": "preferences",
    "rankings": "rankings",
    "process": "solutions",
    "dpo": "preferences",
    "kto": "unpaired",
}
STEPS = {"ppo": 4, "grpo": 2, "online_dpo": 4}  # optimizer steps of an iteration
EPISODES = {"ppo": 4, "grpo": 2}  # responses that an iteration learns from
HORIZON, TARGET = 100, 0.004  # among the KLs of these runs, so that the coefficient rises and falls
OFTEN = ["--trainer.val_check_interval", "1", "--trainer.num_sanity_val_steps", "1", "--samples.every_n_steps", "3"]
ONCE = [
    "--trainer.check_val_every_n_epoch",
    "2",
    "--trainer.val_check_interval",
    "1.0",
    "--trainer.num_sanity_val_steps",
    "0",
    "--samples.every_n_steps",
    "0",
]


class Trace(NamedTuple):
    """What a run leaves, and how each training step began.

    Attributes:
        starts: Modes of all networks, and the states of all random generators.
        rates: Learning rates of the parameter groups at each optimizer step.
        train: Logged rows of the training.
        last: The last evaluation.
        checkpoint: At the end of the run.
    """

    starts: list[tuple]
    rates: list[list[float]]
    train: list[dict[str, str]]
    last: dict[str, str]
    checkpoint: dict


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=runs.METHODS)
def method(request):
    return request.param


def options(method):
    length = ["--data.source.prompts", "24", "--model.iterations", "8", "--trainer.max_epochs", "-1"]
    if method in ROWS:
        length = [f"--data.source.{ROWS[method]}", "28"]
    if method == "ppo":
        length += ["--model.update.critic_lr", str(CRITIC)]
    if method in EPISODES:
        length += ["--model.kl.target", str(TARGET)]
    return [*SCHEDULE, *length, "--trainer.log_every_n_steps", "1"]


def run(method, base, folder, *more):
    starts, rates = [], []
    module = runs.MODULES[method]
    step = module.training_step

    def training_step(self, *args):
        randoms = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        starts.append((all(part.training for part in self.modules()), torch.is_grad_enabled(), randoms))
        return step(self, *args)

    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_step", training_step)
        cli.main(runs.arguments(method, base, folder, *options(method), *more))
    handle.remove()
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train = [{name: x for name, x in row.items() if name.startswith("train/") and x} for row in rows]
    evaluations = [{name: x for name, x in row.items() if name.startswith("eval/") and x} for row in rows]
    checkpoint = checkpoint_file.read(folder / "checkpoints" / checkpoint_file.LAST)
    return Trace(starts, rates, [row for row in train if row], [row for row in evaluations if row][-1], checkpoint)


@pytest.fixture(scope="module")
def alone(method, base, tmp_path_factory):
    """A run that validates once, after its last step."""
    return run(method, base, tmp_path_factory.mktemp(method) / "alone", *ONCE)


def test_every_module_is_here():
    assert {runs.MODULES[method].__name__ for method in runs.METHODS} == set(modules.__all__)


def test_each_step_has_the_rate_of_the_schedule(method, alone):
    expected = [rate for rate in RATES for _ in range(STEPS.get(method, 1))]
    assert [rates[0] / PEAK for rates in alone.rates] == pytest.approx(expected, abs=1e-6)
    if method == "ppo":
        assert [rates[-1] / CRITIC for rates in alone.rates] == pytest.approx(expected, abs=1e-6)
    assert [float(row["train/learning_rate"]) / PEAK for row in alone.train] == pytest.approx(RATES, abs=1e-6)


@pytest.mark.parametrize("method", EPISODES, indirect=True, scope="module")
def test_the_kl_coefficient_follows_the_kl_of_each_iteration(method, alone):
    """c (1 + clip(KL / target - 1, -0.2, 0.2) episodes / horizon), Ziegler et al. 2019, section 2.2; first the KL is 0."""
    kl, found = ([float(row[f"train/{name}"]) for row in alone.train] for name in ("objective/kl", "kl_coef"))
    expected = [0.15]
    for value in kl[:-1]:
        expected.append(expected[-1] * (1 + min(max(value / TARGET - 1, -0.2), 0.2) * EPISODES[method] / HORIZON))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[1] == pytest.approx(0.15 * (1 - 0.2 * EPISODES[method] / 100), rel=1e-6)
    assert any(after > before for before, after in pairwise(found))
    if method == "ppo":  # the coefficient that is logged is the one that is used
        penalties = [float(row["train/objective/non_score_reward"]) for row in alone.train]
        assert penalties == pytest.approx([-c * x for c, x in zip(found, kl, strict=True)], rel=1e-5, abs=1e-7)


def test_validations_and_samples_leave_no_trace_in_the_training(method, base, alone, tmp_path):
    """One run validates after every batch and shows samples after every third; the other validates at its end."""
    often = run(method, base, tmp_path / "often", *OFTEN)
    assert all(training and gradients for training, gradients, _ in often.starts)
    assert len(often.starts) == len(alone.starts) > len(RATES) - 1
    assert [start for start, other in zip(often.starts, alone.starts, strict=True) if start != other] == []
    assert often.train == alone.train
    assert often.last == alone.last
    ours, theirs = often.checkpoint, alone.checkpoint
    kept = [name for name in ours if name not in ("callbacks", "loops", "run")]
    assert runs.unequal({name: ours[name] for name in kept}, {name: theirs[name] for name in kept}, "last.ckpt") == []
    assert runs.unequal(ours["run"]["ranks"], theirs["run"]["ranks"], "run") == []
