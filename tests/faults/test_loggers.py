"""A logger whose server is away: told once, training goes on, and metrics.csv has every row."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from rlhf_lightning.callbacks import loggers
from rlhf_lightning.callbacks.loggers import Tolerant, run_loggers
from rlhf_lightning.cli import main

ROOT = Path(__file__).parents[2]
TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SFT = [
    "fit",
    "--model",
    "SFTModule",
    "--model.policy.architecture",
    json.dumps(TINY),
    "--data",
    "DemonstrationDataModule",
]
SFT += [
    "--data.source",
    "HHHWorld",
    "--data.source.demonstrations",
    "24",
    "--data.source.held_out",
    "4",
    "--data.batch_size",
    "4",
]
SFT += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
SFT += ["--trainer.enable_progress_bar", "false", "--model.sampling.max_new_tokens", "4"]


class Remote(Logger):
    """Raises from some call on, as a logger does whose server is gone."""

    name, version = "remote", 0

    def __init__(self, error, good=1):
        super().__init__()
        self.error, self.good, self.calls = error, good, []

    def log_metrics(self, metrics, step=None):
        self.calls.append(step)
        if len(self.calls) > self.good:
            raise self.error

    def log_hyperparams(self, params, *args, **kwargs):
        self.log_metrics({})

    def finalize(self, status):
        self.log_metrics({})


class MlflowException(Exception):
    """As MLflow's: no OSError."""


MlflowException.__module__ = "mlflow.exceptions"


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize(
    "error",
    [ConnectionError("refused"), OSError(101, "unreachable"), TimeoutError(), MlflowException("503\x1b[2J")],
    ids=repr,
)
def test_a_server_that_goes_away_is_told_of_once(error, caplog, monkeypatch):
    monkeypatch.setattr(loggers, "PAUSE", 0.0)
    remote = Remote(error)
    logger = Tolerant(remote)
    for step in range(5):
        logger.log_metrics({"x": 1.0}, step=step)
    assert remote.calls == [0, 1, 2, 3, 4]  # asked again each time: it may come back
    assert [record.message for record in caplog.records if "training goes on" in record.message] != []
    assert len(caplog.records) == 1
    assert "\x1b" not in caplog.text
    logger.finalize("success")
    assert "5 calls failed" in caplog.records[-1].message


def test_a_server_that_is_away_is_not_asked_at_every_step(caplog):
    remote = Remote(ConnectionError())
    logger = Tolerant(remote)
    for step in range(5):
        logger.log_metrics({"x": 1.0}, step=step)
    assert remote.calls == [0, 1]
    logger.finalize("success")
    assert len(remote.calls) == 3


def test_a_server_that_comes_back_is_used_again(monkeypatch):
    monkeypatch.setattr(loggers, "PAUSE", 0.0)
    remote = Remote(ConnectionError(), good=0)
    logger = Tolerant(remote)
    logger.log_metrics({}, step=0)
    remote.good = 10
    logger.log_metrics({}, step=1)
    assert logger._failures == 1


def test_a_mistake_in_a_logger_is_not_hidden():
    with pytest.raises(KeyError):
        Tolerant(Remote(KeyError("loss"), good=0)).log_metrics({}, step=0)


def test_the_local_file_is_not_tolerant(tmp_path):
    """A full disk must end the run: rows that are nowhere would be lost in silence."""
    local, other = CSVLogger(tmp_path), CSVLogger(tmp_path)
    remote = Remote(OSError())
    assert run_loggers(local, [other, remote])[:2] == [local, other]
    assert run_loggers(local, [remote])[1].inner is remote


MINE = """
from lightning.pytorch.loggers import Logger

class Away(Logger):
    name, version = "away", 0

    def log_metrics(self, metrics, step=None):
        raise ConnectionError("nobody there")

    log_hyperparams = finalize = log_metrics
"""


@pytest.mark.parametrize("several", [False, True])
def test_a_run_whose_own_logger_fails_ends_well_with_every_row(tmp_path, several, caplog):
    mine = tmp_path / f"logger_of_test_{several:d}.py"
    mine.write_text(MINE)
    given = {"class_path": f"{mine.stem}.Away"}
    args = ["--trainer.logger", json.dumps([given, given] if several else given)]
    args += ["--import", str(mine), "--trainer.default_root_dir", str(tmp_path / "run")]
    main([*SFT, *args])
    assert len(metrics(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    assert sum("training goes on" in record.message for record in caplog.records) == 1 + several


def wandb_online(tmp_path, **environment):
    command = [sys.executable, "-m", "rlhf_lightning", *SFT, "--wandb", "online", "--samples.every_n_steps", "2"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),
    }
    address = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "4", "WANDB_SILENT": "true"}
    return subprocess.run(
        [*command, "--trainer.default_root_dir", str(tmp_path / "run")],
        cwd=ROOT, env=clean | address | environment, capture_output=True, text=True, check=False, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_wandb_online_without_a_server_goes_on_offline(tmp_path):
    done = wandb_online(tmp_path, WANDB_API_KEY="0" * 40)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "wandb sync" in line]
    assert len(said) == 1
    folder = Path(said[0].rpartition("wandb sync ")[2].strip())
    assert list(folder.glob("run-*.wandb"))
    assert folder.is_relative_to(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 6


@pytest.mark.slow
def test_wandb_online_without_a_key_is_a_mistake_that_can_be_put_right(tmp_path):
    done = wandb_online(tmp_path)
    assert done.returncode == 2
    assert "API key" in done.stderr.splitlines()[-1]
    assert "--wandb offline" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()
