"""A reward that raises, hangs or returns nonsense at some iteration: retried, skipped or stopped, and never a silent zero."""

import csv
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.failures import GuardedReward, IterationSkipped, RewardFailures
from rlhf_lightning.rewards.reward import Reward, Samples
from tests.faults.faulty import fit, ppo, prompts, weights

SAMPLES = Samples(["a", "b"], ["x", "y"], [[1], [2]], [False, False])
ROOT = Path(__file__).parents[2]


def raises():
    raise RuntimeError("the judge is\x1b[31m away\nand will not be back")


def hangs():
    """Longer than any wait here, in a thread that ends with the process."""
    NEVER.wait(60)
    return 0.0


NEVER = threading.Event()
FAULTS = {
    "raises": (raises, "RuntimeError: the judge is"),
    "hangs": (hangs, "no answer within 3 s"),
    "nan": (lambda: float("nan"), "returned nan"),
    "infinite": (lambda: float("inf"), "returned inf"),
    "wrong count": (None, "one each is due"),
}

# Seconds that an answer may take. Only a call that hangs is to meet the limit, on a busy machine too.
PATIENCE = {fault: 3.0 if fault == "hangs" else 60.0 for fault in FAULTS}


class Failing(Reward):
    """1, 2, 3, ... by call; a fault at some of the calls."""

    def __init__(self, fault: str, at: set[int]):
        self.fault, self.at, self.calls = fault, at, 0

    @property
    def name(self):
        return "judge"

    def score(self, samples):
        self.calls += 1
        if self.calls not in self.at:
            return torch.full((len(samples.prompts),), float(self.calls))
        body = FAULTS[self.fault][0]
        return torch.zeros(1 + len(samples.prompts)) if body is None else torch.full((len(samples.prompts),), body())


def guarded(fault="raises", at=frozenset({1}), all_sum=lambda x: x, **plan):
    return GuardedReward(Failing(fault, set(at)), RewardFailures(timeout=PATIENCE[fault], **plan), all_sum)


# ---------------------------------------------------------------- one call


@pytest.mark.parametrize("fault", FAULTS)
def test_stopping_names_reward_iteration_and_cause_and_keeps_what_was_raised(fault):
    with pytest.raises(UserError) as caught:
        guarded(fault).during(7).score(SAMPLES)
    message = str(caught.value)
    assert "reward judge failed in iteration 7" in message
    assert FAULTS[fault][1] in message
    assert "\x1b" not in message
    assert "\n" not in message
    if fault == "raises":
        assert type(caught.value.__cause__) is RuntimeError


def test_the_whole_traceback_is_in_the_log_without_its_escapes(caplog):
    with pytest.raises(UserError):
        guarded().during(7).score(SAMPLES)
    assert "Traceback" in caplog.text
    assert "in raises" in caplog.text
    assert "and will not be back" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_retry_gives_the_scores_of_the_call_that_worked(fault):
    reward = guarded(fault, at={1, 2}, retries=2)
    assert reward.during(1).score(SAMPLES).tolist() == [3.0, 3.0]
    assert reward.state() == {"failures": 2, "skipped": 0, "in_a_row": 0}


def test_a_retry_too_few_is_a_failure():
    with pytest.raises(UserError, match="iteration 1"):
        guarded(at={1, 2}, retries=1).during(1).score(SAMPLES)


def test_a_dead_reward_stops_the_run_though_iterations_may_be_skipped():
    reward = guarded(at=range(1, 100), then="skip", max_skips=3)
    for iteration in (1, 2):
        with pytest.raises(IterationSkipped):
            reward.during(iteration).score(SAMPLES)
    with pytest.raises(UserError, match=r"iteration 3.*max_skips.*the judge is"):
        reward.during(3).score(SAMPLES)
    assert reward.state() == {"failures": 3, "skipped": 3, "in_a_row": 3}


def test_a_success_in_between_begins_the_count_anew():
    reward = guarded(at={1, 3, 5}, then="skip", max_skips=2)
    for iteration in range(1, 6):
        if iteration % 2:
            with pytest.raises(IterationSkipped):
                reward.during(iteration).score(SAMPLES)
        else:
            reward.during(iteration).score(SAMPLES)
    assert reward.skipped == 3


def test_a_rank_that_has_its_scores_does_what_the_others_do():
    calls = []

    def one_other_rank_fails_twice(mine):
        calls.append(mine.item())
        return mine + (1.0 if len(calls) <= 2 else 0.0)

    reward = guarded(at=(), retries=2, all_sum=one_other_rank_fails_twice)
    assert reward.during(1).score(SAMPLES).tolist() == [1.0, 1.0]
    assert reward.reward.calls == 1  # its own scores are kept
    assert calls == [0.0, 0.0, 0.0]
    assert reward.failures == 2
    calls.clear()
    with pytest.raises(UserError, match="on another rank"):
        guarded(at=(), retries=1, all_sum=one_other_rank_fails_twice).during(4).score(SAMPLES)


def test_outside_of_training_a_failure_always_stops():
    for fault in FAULTS:
        with pytest.raises(UserError, match="reward judge failed outside of training"):
            guarded(fault, then="skip").score(SAMPLES)
    assert guarded(retries=1).score(SAMPLES).tolist() == [2.0, 2.0]


def test_a_thread_of_its_own_sees_the_same_autocast_and_keeps_no_graph():
    class Look(Reward):
        def score(self, samples):
            x = torch.ones(2, 2, requires_grad=True)
            self.seen = (x @ x).dtype, (x * 2).requires_grad
            return x.sum(0)

    for timeout in (None, 60.0):
        look = Look()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            GuardedReward(look, RewardFailures(timeout=timeout), lambda x: x).during(1).score(SAMPLES)
        assert look.seen == (torch.bfloat16, False)


def test_ctrl_c_is_not_a_failure():
    class Interrupted(Reward):
        def score(self, samples):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedReward(Interrupted(), RewardFailures(retries=3, then="skip"), lambda x: x).during(1).score(SAMPLES)


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"max_skips": 0}, {"timeout": 0.0}], ids=str)
def test_plans_that_nothing_can_follow_are_refused(wrong):
    with pytest.raises(UserError):
        RewardFailures(**wrong)


# ---------------------------------------------------------------- a run of PPO


class Watch(Callback):
    """Everything that an iteration may change, after every batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        optimizer = pl_module.optimizers().optimizer
        state = [
            weights(pl_module),
            optimizer.state_dict()["state"],
            pl_module.kl.coef,
            pl_module.lr_schedulers().state_dict(),
        ]
        self.states.append([json.dumps(plain(part)) for part in state] + [pl_module.iteration, pl_module.episodes])


def plain(x):
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items() if not callable(v)}
    return [plain(v) for v in x] if isinstance(x, list) else x if isinstance(x, int | float | str | None) else str(x)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("fault", ["raises", "nan", "hangs"])
def test_a_skipped_iteration_leaves_no_trace_but_its_count(base, tmp_path, fault, caplog):
    module, watch = ppo(base, Failing(fault, {2}), then="skip", timeout=PATIENCE[fault]), Watch()
    logger = CSVLogger(tmp_path, name="", version="")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(module, prompts(), tmp_path, max_epochs=1, logger=logger, callbacks=[watch, saver], enable_checkpointing=True)
    one, two, three, four = watch.states
    assert one == two
    for before, after in ((two, three), (three, four)):
        assert all(a != b for a, b in zip(before, after, strict=True))
    assert (module.iteration, module.episodes) == (3, 24)
    assert "skipped" in caplog.text
    logged = rows(tmp_path)
    assert [row["train/rewards/skipped_iterations"] for row in logged] == ["0.0", "1.0", "1.0", "1.0"]
    assert [row["train/rewards/failures"] for row in logged] == ["0.0", "1.0", "1.0", "1.0"]
    assert [row["train/objective/scores"] for row in logged] == ["1.0", "", "3.0", "4.0"]  # no zero among them
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["ppo"]["reward"]
    assert saved == {"failures": 1, "skipped": 1, "in_a_row": 0}


def test_the_count_goes_on_after_a_resume(base, tmp_path):
    module = ppo(base, Failing("nan", {1, 2}), then="skip")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(module, prompts(), tmp_path, max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    again = ppo(base, Failing("nan", {1}), then="skip")
    pl_trainer = fit_from(again, tmp_path / "last.ckpt", tmp_path)
    assert again.scorer.state() == {"failures": 3, "skipped": 3, "in_a_row": 0}
    assert pl_trainer.current_epoch == 2


def fit_from(module, checkpoint, folder):
    runner = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
        enable_checkpointing=False, default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    runner.fit(module, datamodule=prompts(), ckpt_path=checkpoint, weights_only=True)
    return runner


@pytest.mark.parametrize("fault", ["raises", "wrong count"])
def test_a_stopped_run_has_the_weights_of_the_iteration_before(base, tmp_path, fault):
    module, watch = ppo(base, Failing(fault, {3})), Watch()
    with pytest.raises(UserError, match="reward judge failed in iteration 3"):
        fit(module, prompts(), tmp_path, max_epochs=1, callbacks=[watch])
    assert len(watch.states) == 2
    assert json.dumps(plain(weights(module))) == watch.states[-1][0]


def test_a_retried_iteration_is_the_one_that_would_have_been(base, tmp_path):
    class Flaky(Failing):
        def score(self, samples):
            score = super().score(samples)
            return score * 0 + torch.tensor([float(len(ids)) for ids in samples.completion_ids])

    smooth, retried = ppo(base, Flaky("raises", set())), ppo(base, Flaky("raises", {2}), retries=1)
    for module in (smooth, retried):
        fit(module, prompts(), tmp_path, max_epochs=1)
    assert retried.scorer.failures == 1
    expected = weights(smooth)
    for name, value in weights(retried).items():
        assert torch.equal(value, expected[name]), name


def test_a_validation_that_can_not_be_scored_stops_and_counts_nothing(base, tmp_path):
    module = ppo(base, Failing("nan", {2}), then="skip")
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.raises(UserError, match=r"reward judge failed outside of training.*nan"):
        fit(module, prompts(held_out=True), tmp_path, max_steps=4, val_check_interval=1, logger=logger)
    assert not any(key.startswith("eval/") for row in rows(tmp_path) for key in row)


def test_a_prediction_that_can_not_be_scored_stops(base, tmp_path):
    module = ppo(base, Failing("raises", {1}), then="skip")
    runner = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="outside of training"):
        runner.predict(module, datamodule=prompts(held_out=True))


# ---------------------------------------------------------------- two ranks

TWO_RANKS = """
import os
calls = 0

def judge(prompts, completions):
    global calls
    calls += 1
    if os.environ.get("LOCAL_RANK") == "1" and calls in {at}:
        raise RuntimeError("only here")
    return [float(len(prompts))] * len(prompts)
"""


def two_ranks(base, folder, at, *more):
    judge = folder / "judge_of_two_ranks.py"
    judge.write_text(TWO_RANKS.replace("{at}", repr(at)))
    args = ["fit", "--model", "PPOModule", "--model.policy.path", str(base / "policy"), "--model.critic", "null"]
    args += ["--import", str(judge), "--model.reward", "FunctionReward", "--model.reward.function", f"{judge}:judge"]
    args += ["--model.sampling.max_new_tokens", "4", "--model.update.minibatch_size", "4", "--model.update.epochs", "1"]
    args += [
        "--data",
        "PromptDataModule",
        "--data.source",
        "HHHWorld",
        "--data.source.prompts",
        "24",
        "--data.batch_size",
        "4",
    ]
    args += ["--data.source.held_out", "4", "--trainer.limit_val_batches", "0", "--trainer.devices", "2"]
    args += [
        "--trainer.strategy",
        "ddp",
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_epochs",
        "1",
        "--wandb",
        "disabled",
    ]
    args += ["--samples.every_n_steps", "0", "--trainer.enable_progress_bar", "false", *more]
    command = [sys.executable, "-m", "rlhf_lightning", *args, "--trainer.default_root_dir", str(folder / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_two_ranks_skip_together(base, tmp_path):
    done = two_ranks(base, tmp_path, {2}, "--model.update.reward_failures.then", "skip")
    assert done.returncode == 0, done.stderr[-2000:]
    logged = [row for row in rows(tmp_path / "run") if row["train/rewards/skipped_iterations"]]
    assert [row["train/rewards/skipped_iterations"] for row in logged] == ["0.0", "1.0", "1.0"]
    assert [row["train/objective/scores"] for row in logged] == ["4.0", "", "4.0"]


@pytest.mark.slow
def test_two_ranks_stop_together(base, tmp_path):
    done = two_ranks(base, tmp_path, {2})
    assert done.returncode == 2
    assert "reward judge failed in iteration 2" in done.stderr
    assert "only here" in done.stderr
    assert not (tmp_path / "run" / "export").exists()
