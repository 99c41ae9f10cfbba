"""What the end of a run leaves: the best and the last weights, a validation after the last step, one W&B run."""

import csv
import json
from pathlib import Path

import pytest
import torch
import wandb
from safetensors.torch import load_file

from rlhf_lightning import cli
from rlhf_lightning.callbacks.loggers import RUN_ID, continue_wandb, wandb_logger
from tests.integration.test_runs import SFT

ADAM = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.01"]


def fit(folder, *more):
    cli.main(["fit", *SFT, *ADAM, "--trainer.default_root_dir", str(folder), *more])
    wandb.finish()  # as the end of a process would
    return folder


def rows_with(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get(name)]


def policy_of(checkpoint):
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("policy.network."): weight for name, weight in weights.items()}


def holds(folder, checkpoint):
    """Whether an export has the weights of a checkpoint."""
    expected, found = policy_of(checkpoint), load_file(folder / "model.safetensors")
    return all(torch.equal(weight, expected[name]) for name, weight in found.items())


WORST = ["--checkpoint.monitor", "eval/loss", "--checkpoint.mode", "max", "--trainer.val_check_interval", "2"]


def test_the_best_checkpoint_is_exported_and_the_last_beside_it(tmp_path, caplog):
    """The loss falls, so that its highest value is that of the first validation."""
    caplog.set_level("INFO")
    folder = fit(tmp_path / "run", *WORST, "--trainer.max_steps", "6")
    values = [float(row["eval/loss"]) for row in rows_with(folder, "eval/loss")]
    assert max(values) == values[0]
    (best,) = (folder / "checkpoints").glob("step=*.ckpt")
    assert best.name == "step=2.ckpt"
    assert holds(folder / "export", best)
    assert holds(folder / "export-last", folder / "checkpoints" / "last.ckpt")
    assert not holds(folder / "export", folder / "checkpoints" / "last.ckpt")
    assert "step=2.ckpt" in caplog.text
    assert "eval/loss" in caplog.text
    cli.main(["export", "--run", str(folder), "--output", str(tmp_path / "again")])
    assert holds(tmp_path / "again", best)
    assert "step=2.ckpt" in caplog.records[-1].message
    last = folder / "checkpoints" / "last.ckpt"
    cli.main(["export", "--run", str(folder), "--checkpoint", str(last), "--output", str(tmp_path / "last")])
    assert holds(tmp_path / "last", last)


def test_the_folder_that_is_asked_for_holds_the_best(tmp_path):
    folder = fit(tmp_path / "run", *WORST, "--trainer.max_steps", "4", "--export.folder", str(tmp_path / "mine"))
    assert holds(tmp_path / "mine", next((folder / "checkpoints").glob("step=*.ckpt")))
    assert holds(tmp_path / "mine-last", folder / "checkpoints" / "last.ckpt")
    assert not (folder / "export").exists()


def test_a_resumed_run_that_was_over_exports_the_best_too(tmp_path):
    folder = fit(tmp_path / "run", *WORST, "--trainer.max_steps", "4")
    for name in ("export", "export-last"):
        (folder / name / "model.safetensors").unlink()
    fit(folder, *WORST, "--trainer.max_steps", "4", "--ckpt_path", "last")
    assert holds(folder / "export", folder / "checkpoints" / "step=2.ckpt")
    assert holds(folder / "export-last", folder / "checkpoints" / "last.ckpt")


def test_without_a_monitor_the_last_is_exported_alone(tmp_path):
    folder = fit(tmp_path / "run", "--trainer.max_steps", "2")
    assert holds(folder / "export", folder / "checkpoints" / "last.ckpt")
    assert not (folder / "export-last").exists()


def test_a_monitor_that_nothing_logs_is_warned_about(tmp_path, caplog):
    folder = fit(tmp_path / "run", "--trainer.max_steps", "2", "--checkpoint.monitor", "eval/los")
    assert holds(folder / "export", folder / "checkpoints" / "last.ckpt")
    assert "checkpoint.monitor eval/los was never logged" in caplog.text
    assert "eval/loss" in caplog.text


@pytest.mark.parametrize(
    "more",
    [
        ["--trainer.max_steps", "3"],  # of eight steps an epoch
        ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "5"],
        [
            "--trainer.max_steps",
            "3",
            "--trainer.check_val_every_n_epoch",
            "null",
            "--trainer.val_check_interval",
            "100",
        ],
    ],
)
def test_a_run_validates_after_its_last_step_and_once(tmp_path, more):
    folder = fit(tmp_path / "run", *more)
    rows = rows_with(folder, "eval/loss")
    assert [int(row["step"]) for row in rows] == [8 if "--trainer.max_epochs" in more else 3]
    fit(folder, *more, "--ckpt_path", "last")  # over
    assert rows_with(folder, "eval/loss") == rows


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["--trainer.max_steps", "3", "--trainer.val_check_interval", "2"], [2, 3]),
        (["--trainer.max_steps", "4", "--trainer.val_check_interval", "2"], [2, 4]),
        (["--trainer.max_steps", "3", "--trainer.limit_val_batches", "0"], []),
        (["--trainer.max_epochs", "1"], [8]),
    ],
)
def test_other_runs_validate_as_they_are_told(tmp_path, more, steps):
    folder = fit(tmp_path / "run", *more)
    assert [int(row["step"]) for row in rows_with(folder, "eval/loss")] == steps


def test_a_resumed_run_validates_after_its_own_last_step(tmp_path):
    interval = ["--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "2"]
    folder = fit(tmp_path / "run", "--trainer.max_steps", "2", *interval)
    fit(folder, "--trainer.max_steps", "3", *interval, "--ckpt_path", "last")
    assert [int(row["step"]) for row in rows_with(folder, "eval/loss")] == [2, 3]


# ---------------------------------------------------------------- W&B

OFFLINE = ["--wandb", "offline", "--trainer.limit_val_batches", "0"]


def wandb_runs(folder):
    return sorted(path.name.rsplit("-", 1)[-1] for path in Path(folder, "wandb").glob("offline-run-*"))


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path):
    folder = fit(tmp_path / "run", *OFFLINE, "--trainer.max_steps", "1")
    fit(folder, *OFFLINE, "--trainer.max_steps", "2", "--ckpt_path", "last")
    ids = wandb_runs(folder)
    assert len(ids) == 2
    assert ids[0] == ids[1] == (folder / RUN_ID).read_text().strip()
    fit(folder, *OFFLINE, "--trainer.max_steps", "1", "--overwrite", "true")
    assert wandb_runs(folder) != ids[:1]  # another run


def test_ids_are_made_once_a_folder_and_never_twice(tmp_path):
    first, again, other = (wandb_logger(str(tmp_path / name), online=False) for name in ("a", "a", "b"))
    assert first._wandb_init["id"] == again._wandb_init["id"] != other._wandb_init["id"]
    assert first._wandb_init["resume"] == "allow"


def test_a_logger_of_the_users_own_is_continued_unless_it_has_an_id(tmp_path):
    from lightning.pytorch.loggers import WandbLogger

    own, named = WandbLogger(offline=True, save_dir=tmp_path), WandbLogger(offline=True, save_dir=tmp_path, id="mine")
    continue_wandb([own, named], str(tmp_path))
    assert own._wandb_init["id"] == (tmp_path / RUN_ID).read_text().strip()
    assert own.version == own._wandb_init["id"]
    assert named._wandb_init["id"] == "mine"
    assert json.dumps(own._wandb_init["resume"]) == '"allow"'
