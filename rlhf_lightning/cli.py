"""The command line: Lightning's fit, validate, test and predict, and the commands beside them."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger

from rlhf_lightning import losses, modules, rewards, rollouts, worlds  # noqa: F401  (short class names in YAML)
from rlhf_lightning.callbacks.export import ExportAtEnd
from rlhf_lightning.callbacks.metrics_file import RunMetrics
from rlhf_lightning.callbacks.predictions import PredictionLines
from rlhf_lightning.callbacks.progress import RunProgress
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.commands.chat import chat
from rlhf_lightning.commands.export import export
from rlhf_lightning.commands.parser import CommandParser, TrainerParser, one_line, users_mistakes
from rlhf_lightning.commands.pipeline import pipeline
from rlhf_lightning.commands.quiet import be_quiet
from rlhf_lightning.commands.run_folder import ForgetFailedStart, RunFolder, SaveRunConfig
from rlhf_lightning.data.demonstrations import DemonstrationDataModule  # noqa: F401
from rlhf_lightning.data.preferences import PreferenceDataModule  # noqa: F401
from rlhf_lightning.data.prompts import PromptDataModule  # noqa: F401
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import evaluation  # noqa: F401
from rlhf_lightning.modules import strategies  # noqa: F401
from rlhf_lightning.rewards import composite, function, reward_model, world  # noqa: F401
from rlhf_lightning.rollouts import advantages, kl_control  # noqa: F401

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS: dict[str, Callable[..., Any]] = {"pipeline": pipeline, "export": export, "chat": chat}


class RLHFCLI(LightningCLI):
    """LightningCLI with a run folder that holds everything, loggers that need no account, and an export at the end."""

    run_folder: RunFolder

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--wandb", type=Literal["offline", "online", "disabled"], default="offline", help="Where W&B metrics go."
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run that the folder holds.")
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(ExportAtEnd, "export")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{step}"})
        # Else it saves after validations only, and last.ckpt lacks whatever was trained since the last of them.
        parser.set_defaults({"checkpoint.save_on_train_epoch_end": True})

    def _parse_ckpt_path(self) -> None:
        """The command line wins over what a checkpoint remembers; our checkpoints hold no hyper-parameters at all."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        root = config.trainer.default_root_dir or f"runs/{_short_name(config.model.class_path)}"
        config.trainer.default_root_dir = str(root)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(root, "checkpoints"))
        limits = (config.trainer.max_epochs, config.trainer.max_time)
        if config.trainer.max_steps == -1 and limits == (None, None):
            config.trainer.max_epochs = 1  # Lightning's default is a thousand
        self.run_folder = RunFolder(root)
        lines = PredictionLines.path(root)
        if self.subcommand == "predict" and lines.exists() and not config.overwrite:
            raise UserError(
                f"{lines} exists; replace it with --overwrite true, or give another --trainer.default_root_dir"
            )
        last = Path(config.checkpoint.dirpath, "last.ckpt")
        if config.get("ckpt_path") == "last" and not last.is_file():
            raise UserError(f"--ckpt_path last: there is no {last}; leave the flag out to begin a run")
        if self.subcommand == "fit":
            self.run_folder.claim(resuming=config.get("ckpt_path") is not None, overwrite=config.overwrite)

    def instantiate_classes(self) -> None:
        with users_mistakes():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config[self.subcommand]
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif config.trainer.logger is None:
            kwargs["logger"] = default_loggers(config.trainer.default_root_dir, config.wandb)
        self.trainer_defaults["callbacks"] = [ForgetFailedStart(self.run_folder), PredictionLines()]
        if config.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(RunProgress())
        return super().instantiate_trainer(**kwargs)


def default_loggers(folder: str, wandb: str) -> list[Logger]:
    """metrics.csv in the run's folder, and W&B: offline unless asked otherwise."""
    loggers: list[Logger] = [RunMetrics(folder)]
    if wandb != "disabled":
        os.environ.setdefault("WANDB_SILENT", "true")
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = "/".join(Path(folder).parts[-2:])
        loggers.append(WandbLogger(name=name, save_dir=folder, offline=wandb == "offline", project="rlhf_lightning"))
    return loggers


def run_trainer(args: list[str]) -> RLHFCLI:
    """Parse and run one of Lightning's commands.

    Args:
        args: As on the command line, the command first.

    Raises:
        UserError: For what the user can put right.
    """
    return RLHFCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        trainer_defaults={
            "log_every_n_steps": 10,
            "use_distributed_sampler": False,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=TrainerParser,
        args=args,
    )


def run_command(name: str, args: list[str]) -> None:
    """Run a command that is not a Trainer loop; its YAML and flags look the same."""
    function_ = COMMANDS[name]
    parser = CommandParser(prog=f"rlhf_lightning {name}", description=(function_.__doc__ or "").split("\n")[0])
    parser.add_argument("-c", "--config", action="config", help="Path to a configuration file.")
    parser.add_function_arguments(function_, fail_untyped=True, sub_configs=True)
    parsed = parser.parse_args(args)
    with users_mistakes():
        init = parser.instantiate_classes(parsed)
    init.pop("config", None)
    function_(**init)


def main(args: list[str] | None = None) -> None:
    """Entry point: exit code 0, or 2 and one line for a user's mistake."""
    args = list(sys.argv[1:] if args is None else args)
    be_quiet()
    try:
        if args and args[0] in COMMANDS:
            run_command(args[0], args[1:])
        elif args and args[0] in TRAINER_COMMANDS:
            run_trainer(args)
        else:
            _usage(args)
    except (UserError, MisconfigurationException) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def _usage(args: list[str]) -> None:
    print("usage: python -m rlhf_lightning COMMAND [-c CONFIG ...] [--KEY VALUE ...]\n")
    for name in TRAINER_COMMANDS:
        print(f"  {name:<10} {(getattr(pl.Trainer, name).__doc__ or '').strip().splitlines()[0]}")
    for name, function_ in COMMANDS.items():
        print(f"  {name:<10} {(function_.__doc__ or '').strip().splitlines()[0]}")
    print("\nCOMMAND --help lists its keys.")
    if args not in ([], ["-h"], ["--help"]):
        raise UserError(f"{args[0]!r} is not a command")


def _short_name(class_path: str) -> str:
    name = class_path.rsplit(".", 1)[-1].removesuffix("Module")
    return "".join(
        f"_{c.lower()}" if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name)
    )
