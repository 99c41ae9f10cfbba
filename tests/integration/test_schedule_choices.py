"""Schedules by name, by class and by unit of stepping: the learning rates of real runs against other computations."""

import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from transformers import get_scheduler

from rlhf_lightning import cli
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.modules.ppo_update import PPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from tests.faults.faulty import Rows
from tests.integration.test_iterations import PEAK, SHORT, StopAfter, fit, length, module_of, policy, sft, sgd  # noqa: F401
from tests.integration.test_runs import SFT
from tests.invariance.subjects import Memory
from tests.resume.runs import make_base


def expected(make, steps, peaks=(1.0,)):
    """The rates of a scheduler on an optimizer of its own, one list a group, relative to the first peak."""
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": PEAK * p} for p in peaks], lr=PEAK
    )
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append([group["lr"] / PEAK for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates if len(peaks) > 1 else [rate for (rate,) in rates]


class Halving(LRScheduler):
    """A scheduler of the user's own."""

    def get_lr(self):
        return [base / 2**self.last_epoch for base in self.base_lrs]


CLASSES = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
    "MultiStepLR": lambda optimizer: MultiStepLR(optimizer, [1, 3], gamma=0.1),
    "ExponentialLR": lambda optimizer: ExponentialLR(optimizer, 0.7),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, PEAK, total_steps=6),
    "CyclicLR": lambda optimizer: CyclicLR(optimizer, PEAK / 10, PEAK, step_size_up=2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 4),
    "own": Halving,
}
NAMED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.25},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": PEAK / 100},
    "inverse_sqrt": {"timescale": 3},
    "constant_with_warmup": {},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
}


@pytest.mark.parametrize("name", list(CLASSES))
def test_sft_follows_a_class(tiny, tmp_path, name):
    """Six steps: three epochs of two."""
    _, rates = sft(tiny, tmp_path, schedule=Schedule(scheduler=CLASSES[name]), max_epochs=3)
    assert rates == pytest.approx(expected(CLASSES[name], 6), rel=1e-12)


@pytest.mark.parametrize("name", list(NAMED))
def test_sft_follows_a_schedule_of_transformers(tiny, tmp_path, name):
    def theirs(optimizer):
        return get_scheduler(name, optimizer, 2, 6, scheduler_specific_kwargs=NAMED[name])

    _, rates = sft(tiny, tmp_path, schedule=Schedule(warmup=2, decay=name, options=NAMED[name]), max_steps=6)
    assert rates == pytest.approx(expected(theirs, 6), rel=1e-12)
    assert len(set(rates)) > 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_by_epochs_counts_epochs(tiny, tmp_path, accumulate):
    """Two batches an epoch; the linear decay has three epochs, however many steps they have."""
    each = 2 // accumulate
    settings = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    _, rates = sft(tiny, tmp_path / "a", schedule=Schedule(interval="epoch"), **settings)
    assert rates == pytest.approx([rate for rate in (1, 2 / 3, 1 / 3) for _ in range(each)])
    by_class = Schedule(scheduler=CLASSES["ExponentialLR"], interval="epoch")
    _, rates = sft(tiny, tmp_path / "b", schedule=by_class, **settings)
    assert rates == pytest.approx([0.7**epoch for epoch in range(3) for _ in range(each)])
    _, rates = sft(tiny, tmp_path / "c", schedule=Schedule(interval="epoch"), max_steps=3, accumulate_grad_batches=1)
    assert rates == pytest.approx([1, 1, 0.5])


def ppo(policy, schedule, **more):  # noqa: F811
    return module_of("ppo", policy, schedule=schedule, iterations=5, epochs=1, minibatch_size=4, **more)


@pytest.mark.parametrize(
    ("interval", "counted"), [("iteration", [0, 1, 2, 3, 4]), ("step", [1, 3, 5, 7, 9]), ("epoch", [0, 0, 0, 0, 1])]
)
@pytest.mark.parametrize("method", ["ppo", "grpo", "online_dpo"])
def test_methods_that_sample_count_iterations_steps_or_epochs(policy, tmp_path, method, interval, counted):  # noqa: F811
    """Batches of 8 of 32 prompts: four iterations an epoch. The rate of an iteration is that of its last step."""
    schedule = Schedule(scheduler=CLASSES["ExponentialLR"], interval=interval)
    size = 4 if method == "ppo" else 8
    module = module_of(method, policy, schedule=schedule, iterations=5, minibatch_size=size)
    runner, rates = fit(module, tmp_path)
    assert runner.global_step == 10
    assert rates == pytest.approx([0.7**count for count in counted])


@pytest.mark.parametrize(("interval", "total"), [("iteration", 5), ("step", 10), ("epoch", 2)])
def test_the_length_that_a_named_schedule_gets_is_in_its_own_unit(policy, tmp_path, interval, total):  # noqa: F811
    schedule = Schedule(decay="polynomial", options={"lr_end": 1e-9}, interval=interval)
    _, rates = fit(ppo(policy, schedule), tmp_path)
    last = {"iteration": [0, 1, 2, 3, 4], "step": [1, 3, 5, 7, 9], "epoch": [0, 0, 0, 0, 1]}[interval]
    assert rates == pytest.approx([1 - n / total for n in last], abs=1e-6)


def test_policy_and_critic_keep_their_own_peaks(policy, tmp_path):  # noqa: F811
    """By name, as groups of one optimizer; the names of what is logged are those of every method."""
    schedule = Schedule(warmup=1, decay="cosine_with_min_lr", options={"min_lr_rate": 0.5})
    update = PPOUpdate(epochs=1, minibatch_size=8, critic_lr=3 * PEAK)
    critic = ModelSpec(path=str(make_base(tmp_path / "base") / "reward"))
    module = PPOModule(
        policy,
        critic,
        FunctionReward(length),
        update=update,
        schedule=schedule,
        iterations=4,
        sampling=SHORT,
        optimizer=sgd,
    )
    runner, _ = fit(module, tmp_path)
    rows = [row for row in runner.logger.rows if "train/learning_rate" in row]

    def theirs(optimizer):
        return get_scheduler("cosine_with_min_lr", optimizer, 1, 4, scheduler_specific_kwargs={"min_lr_rate": 0.5})

    wanted = expected(theirs, 4, peaks=(1.0, 3.0))
    found = [[row["train/learning_rate"] / PEAK, row["train/learning_rate/critic"] / PEAK] for row in rows]
    assert [value for pair in found for value in pair] == pytest.approx([value for pair in wanted for value in pair])


# ---------------------------------------------------------------- schedulers that follow a metric


def on_plateau(optimizer):
    """Halves the rate after each validation that is no better than the best by a share of 90 %."""
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)


def cli_sft(folder, *more):
    cli.main(["fit", *SFT, "--trainer.default_root_dir", str(folder), "--model.optimizer", "torch.optim.AdamW", *more])
    text = (folder / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("train/learning_rate")
    return [float(line.split(",")[column]) for line in text[1:] if line.split(",")[column]], text


PLATEAU = [
    "--model.optimizer.lr", "1e-2", "--model.schedule.scheduler", "ReduceLROnPlateau", "--model.schedule.scheduler.factor",
    "0.5", "--model.schedule.scheduler.patience", "0", "--model.schedule.scheduler.threshold", "0.9",
    "--model.schedule.monitor", "eval/loss", "--trainer.val_check_interval", "2",
]  # fmt: skip


def test_a_plateau_is_seen_after_each_validation_and_survives_a_resume(tmp_path):
    """The first validation sets the best loss; those after steps 4 and 6 are no better by 90 %."""
    rates, whole = cli_sft(tmp_path / "whole", *PLATEAU, "--trainer.max_steps", "8")
    assert rates == pytest.approx([1e-2] * 4 + [5e-3] * 2 + [2.5e-3] * 2)
    cli_sft(tmp_path / "cut", *PLATEAU, "--trainer.max_steps", "4")
    _, resumed = cli_sft(tmp_path / "cut", *PLATEAU, "--trainer.max_steps", "8", "--ckpt_path", "last")
    assert resumed == whole


def test_a_plateau_counts_validations_of_methods_that_sample_too(policy, tmp_path):  # noqa: F811
    """One after each of five iterations."""
    schedule = Schedule(scheduler=on_plateau, monitor="eval/greedy/length")
    data = PromptDataModule(Rows(), batch_size=8, split=Split(validation=0.25))
    module = ppo(policy, schedule)
    memory = Memory()
    runner = pl.Trainer(
        accelerator="cpu", logger=memory, enable_progress_bar=False, enable_checkpointing=False, max_epochs=-1,
        default_root_dir=tmp_path, val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=-1,
        enable_model_summary=False,
    )  # fmt: skip
    runner.fit(module, data)
    lengths = [row["eval/greedy/length"] for row in memory.rows if "eval/greedy/length" in row][
        1:
    ]  # the first is before training
    twin = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, wanted = on_plateau(twin), []
    for length_ in lengths:
        wanted.append(twin.param_groups[0]["lr"])
        scheduler.step(length_)
    assert [row["train/learning_rate"] / PEAK for row in memory.rows if "train/learning_rate" in row] == wanted
    assert len(set(wanted)) > 1


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("kind", ["StepLR", "OneCycleLR", "MultiStepLR", "cosine_with_min_lr", "epoch"])
def test_a_resumed_run_has_the_rates_of_the_uninterrupted_one(tiny, tmp_path, kind):
    if kind == "epoch":
        schedule = Schedule(decay="cosine", interval="epoch")
    elif kind in CLASSES:
        schedule = Schedule(scheduler=CLASSES[kind])
    else:
        schedule = Schedule(warmup=2, decay=kind, options=NAMED[kind])
    _, whole = sft(tiny, tmp_path, schedule=schedule, max_epochs=3)
    runner, first = sft(tiny, tmp_path, schedule=schedule, max_epochs=3, callbacks=[StopAfter(4)])
    runner.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)  # no pickles
    _, rest = sft(tiny, tmp_path, tmp_path / "last.ckpt", schedule=schedule, max_epochs=3)
    assert (len(first), [*first, *rest]) == (4, whole)


# ---------------------------------------------------------------- refusals and warnings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay": "cosin"}, "'cosin' is not a schedule; did you mean cosine? there are constant, linear, cosine, "),
        ({"decay": "StepLR"}, "a class is named by schedule.scheduler: StepLR"),
        ({"decay": "quickly"}, "'quickly' is not a schedule; there are constant"),
        ({"decay": "polynomial", "options": {"pwr": 1}}, "polynomial has no pwr; it has lr_end, power"),
        ({"decay": "linear", "options": {"power": 1}}, "linear has the keys warmup and final"),
        ({"decay": "polynomial", "final": 0.1}, "polynomial has schedule.options: lr_end, power"),
        ({"scheduler": Halving, "warmup": 3}, "have no effect beside it"),
        ({"warmup": -1}, "out of range"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_no_run_can_follow_is_refused_at_once(settings, said):
    with pytest.raises(UserError) as error:
        Schedule(**settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("settings", "trainer", "said"),
    [
        ({"interval": "iteration"}, {"max_epochs": 1}, "only methods that sample"),
        ({"decay": "polynomial"}, {}, "needs the length of the run"),
        ({"decay": "warmup_stable_decay"}, {"max_epochs": 1}, "its options are num_decay_steps"),
        (
            {"scheduler": CLASSES["OneCycleLR"]},
            {"max_steps": 7},
            "total_steps 6, and the run has 7 steps",
        ),
        (
            {"scheduler": lambda o: OneCycleLR(o, 1.0)},
            {"max_steps": 5},
            "You must define either total_steps",
        ),
        ({"scheduler": on_plateau}, {"max_epochs": 1}, "schedule.monitor: eval/loss"),
        ({"scheduler": on_plateau, "monitor": "eval/loss"}, {"max_epochs": 1, "limit_val_batches": 0}, "no validation"),
        ({"monitor": "eval/loss"}, {"max_epochs": 1}, "monitor has no effect"),
    ],
    ids=["iteration", "length", "options", "too-short", "no-length", "no-monitor", "no-validation", "no-effect"],
)
def test_what_a_run_can_not_follow_is_refused_before_its_first_step(tiny, tmp_path, settings, trainer, said):
    with pytest.raises(UserError) as error:
        sft(tiny, tmp_path, schedule=Schedule(**settings), **trainer)
    assert said in str(error.value)


def test_a_metric_that_no_validation_logs_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli_sft(tmp_path / "run", *PLATEAU, "--model.schedule.monitor", "eval/los", "--trainer.max_steps", "4")
    said = capsys.readouterr().err
    assert "schedule.monitor: eval/los was not logged by the validation; logged were eval/entropy, eval/loss" in said


@pytest.mark.parametrize(("warmup", "warned"), [(5, True), (4, True), (3, False)])
def test_a_warm_up_that_never_reaches_its_peak_is_warned_about(tiny, tmp_path, caplog, warmup, warned):
    with caplog.at_level(logging.WARNING):
        _, rates = sft(tiny, tmp_path, schedule=Schedule(warmup=warmup), max_steps=4)
    assert (f"schedule.warmup is {warmup} steps and the run has 4" in caplog.text) == warned
    assert math.isclose(max(rates), 1.0) != warned


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("StepLR", "schedule: name a class with schedule.scheduler: StepLR"),
        (
            "{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 2}}",
            "name a class with schedule.scheduler: StepLR",
        ),
        ("inverse_sqrt", "schedule: name a schedule with schedule.decay: inverse_sqrt"),
    ],
    ids=["class", "class_path", "name"],
)
def test_a_schedule_that_is_named_one_level_too_high_is_put_right(tmp_path, capsys, value, said):
    with pytest.raises(SystemExit):
        cli.main(["fit", *SFT, "--trainer.default_root_dir", str(tmp_path / "run"), "--model.schedule", value])
    assert said in capsys.readouterr().err
