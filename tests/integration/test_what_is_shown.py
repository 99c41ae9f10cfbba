"""What a user sees of a run: the progress bar at 80 columns, the profiler's report, loggers and what they receive."""

import os
import pty
import re
import threading
from contextlib import redirect_stdout

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from rlhf_lightning import cli
from rlhf_lightning.callbacks import loggers
from rlhf_lightning.callbacks.loggers import check_installed, wandb_logger
from rlhf_lightning.callbacks.progress import rounded
from rlhf_lightning.commands.quiet import be_quiet
from rlhf_lightning.errors import UserError
from tests.integration.test_runs import SFT
from tests.resume.runs import arguments, make_base

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def terminal(monkeypatch):
    """A pseudo-terminal of 80 columns: a file that writes to it, and a function that closes it and returns its lines."""
    primary, secondary = pty.openpty()
    written = []

    def read():
        while True:
            try:
                found = os.read(primary, 65536)
            except OSError:  # the other end is closed
                return
            written.append(found)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    out = os.fdopen(secondary, "w", buffering=1)
    for name, value in (("COLUMNS", "80"), ("LINES", "24"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)

    def lines():
        out.close()
        reader.join(timeout=30)
        os.close(primary)
        return re.split(r"[\r\n]+", ESCAPES.sub("", b"".join(written).decode()))

    return out, lines


@pytest.mark.parametrize(
    ("method", "start", "shown"),
    [
        ("sft", "SFT epoch 1/1 ", ["loss:", "acc:"]),
        ("reward", "RewardModel epoch 1/1 ", ["loss:", "acc:"]),
        ("dpo", "DPO epoch 1/1 ", ["loss:", "acc:", "margin:"]),
        ("ppo", "PPO iteration ", ["score:", "kl:", "len:"]),
    ],
)
def test_the_bar_is_one_line_of_80_columns(base, tmp_path, terminal, method, start, shown):
    """With metrics; that of a method that samples counts iterations over all epochs: 6, of which an epoch has 4."""
    more = [
        "--trainer.enable_progress_bar",
        "true",
        "--samples.every_n_steps",
        "0",
        "--trainer.limit_train_batches",
        "4",
    ]
    more += ["--trainer.max_epochs", "1"]
    if method == "ppo":
        more += ["--model.iterations", "6", "--trainer.max_epochs", "-1"]
    out, close = terminal
    with redirect_stdout(out):  # pytest puts its own in place between fixture and test
        cli.main(arguments(method, base, tmp_path / "run", *more))
    lines = close()
    bars = [line for line in lines if line.startswith(start)]
    assert bars, lines[-12:]
    assert max(len(line.rstrip()) for line in lines if "export:" not in line and "rlhf_lightning" not in line) <= 80
    last = bars[-1]
    assert ("6/6" if method == "ppo" else "4/4") in last
    assert "/4" not in last or method != "ppo"
    for name in shown:
        assert re.search(rf"{name} -?\d", last), last
    assert "…" not in last
    assert [line for line in lines if any(f" {name}" in line for name in shown) and not line.startswith(start)] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-0.0004, "-0.000"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (12345.6, "12346"),
        (1e7, "1.0e+07"),
        ("x", "x"),
    ],
)
def test_values_in_the_bar_are_short(value, text):
    assert rounded(value) == text


def test_the_report_of_the_profiler_is_visible(tmp_path, caplog):
    be_quiet()
    cli.main(
        [
            "fit",
            *SFT,
            "--trainer.default_root_dir",
            str(tmp_path),
            "--trainer.max_steps",
            "1",
            "--trainer.profiler",
            "simple",
        ]
    )
    assert "run_training_batch" in caplog.text


@pytest.mark.parametrize(
    ("logger", "install"),
    [
        ("TensorBoardLogger", "pip install 'rlhf_lightning[tensorboard]'"),
        ("lightning.pytorch.loggers.MLFlowLogger", "pip install 'rlhf_lightning[mlflow]'"),
        ("CometLogger", "pip install 'comet-ml'"),
        ("WandbLogger", "--wandb disabled"),
    ],
)
def test_a_logger_whose_package_is_missing_says_what_to_install(monkeypatch, logger, install):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        check_installed(logger)
    assert install in str(error.value)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    check_installed(logger)


@pytest.mark.parametrize(
    "more", [["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "x"], ["--wandb", "offline"]]
)
def test_a_fit_ends_in_one_line_without_the_package(tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["fit", *SFT, "--trainer.default_root_dir", str(tmp_path / "run"), *more])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert "is not installed: pip install" in said
    assert not (tmp_path / "run").exists()


def test_wandb_gets_group_and_tags_and_the_settings_of_the_trainer(tmp_path, capfd):
    """The run is offline; its configuration is the one that W&B would show."""
    wandb.finish()  # the run of another test, which would be taken for this one
    configs = []
    update = wandb.sdk.wandb_run.Config.update if hasattr(wandb.sdk.wandb_run, "Config") else wandb.Config.update

    def seen(self, values, *args, **kwargs):
        configs.append(dict(values))
        return update(self, values, *args, **kwargs)

    kind = wandb.sdk.wandb_run.Config if hasattr(wandb.sdk.wandb_run, "Config") else wandb.Config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "update", seen)
        cli.main(
            [
                "fit", *SFT, "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.max_steps", "1", "--wandb",
                "offline", "--wandb_group", "mine", "--wandb_tags", "[a, b]", "--trainer.accumulate_grad_batches", "2",
            ]
        )  # fmt: skip
        run = wandb.run
        assert (run.group, run.tags) == ("mine", ("a", "b"))
        wandb.finish()
    trainer = next(config["trainer"] for config in configs if "trainer" in config)
    wanted = {"precision": "32-true", "devices": 1, "max_steps": 1, "accumulate_grad_batches": 2, "accelerator": "cpu"}
    assert {name: trainer[name] for name in wanted} == wanted
    assert trainer["strategy"] == "SingleDeviceStrategy"
    assert not {"logger", "callbacks", "plugins"} & trainer.keys()
    assert "anonymous" not in "".join(capfd.readouterr())


def test_no_logger_of_wandb_passes_the_setting_that_it_warns_of(tmp_path):
    own = WandbLogger(offline=True, save_dir=tmp_path)
    loggers.continue_wandb([own], str(tmp_path))
    assert "anonymous" not in own._wandb_init
    assert "anonymous" not in wandb_logger(str(tmp_path), online=False)._wandb_init
