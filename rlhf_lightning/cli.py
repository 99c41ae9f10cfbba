"""The command line: Lightning's fit, validate, test and predict, and the commands beside them."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning import losses, modules, rewards, rollouts, worlds  # noqa: F401  (short class names in YAML)
from rlhf_lightning.callbacks.checkpoint_file import LAST, WholeFiles, check_sound
from rlhf_lightning.callbacks.final_validation import FinalValidation
from rlhf_lightning.callbacks.heartbeat import lost_ranks
from rlhf_lightning.callbacks.kept_training import SaveBeforeMeasuring, kept_training
from rlhf_lightning.callbacks.loggers import check_installed, continue_wandb, run_loggers, wandb_logger
from rlhf_lightning.callbacks.metrics_file import RunMetrics
from rlhf_lightning.callbacks.predictions import PredictionLines
from rlhf_lightning.callbacks.progress import RunProgress
from rlhf_lightning.callbacks.run_state import RunState
from rlhf_lightning.commands import registry
from rlhf_lightning.commands.early import answered
from rlhf_lightning.commands.help_page import help_page, wants_help
from rlhf_lightning.commands.imports import FLAG, POLICY, check_checkpoint, check_imports, take_imports
from rlhf_lightning.commands.parser import OneLineErrors, command_parser, keys_as_typed, one_line, users_mistakes
from rlhf_lightning.commands.quiet import be_quiet
from rlhf_lightning.commands.registry import RUN_CLASSES, RUN_FLAGS, TRAINER_COMMANDS
from rlhf_lightning.commands.result import print_result
from rlhf_lightning.commands.run_folder import ForgetFailedStart, RunFolder, SaveRunConfig, first_process
from rlhf_lightning.data import message_trees  # noqa: F401
from rlhf_lightning.data.corrupted_steps import CorruptedSteps  # noqa: F401
from rlhf_lightning.data.demonstrations import DemonstrationDataModule  # noqa: F401
from rlhf_lightning.data.preferences import PreferenceDataModule  # noqa: F401
from rlhf_lightning.data.pretraining import PretrainingMixDataModule  # noqa: F401
from rlhf_lightning.data.prompts import PromptDataModule  # noqa: F401
from rlhf_lightning.data.rankings import RankingDataModule  # noqa: F401
from rlhf_lightning.data.stepwise import StepwiseDataModule  # noqa: F401
from rlhf_lightning.data.unpaired import UnpairedDataModule  # noqa: F401
from rlhf_lightning.errors import RunStopped, UserError, reported
from rlhf_lightning.evaluation import evaluation  # noqa: F401
from rlhf_lightning.generation import native, transformers_engine, vllm_engine, vllm_server  # noqa: F401
from rlhf_lightning.modules import strategies, tensor_parallel, zero  # noqa: F401
from rlhf_lightning.rewards import composite, ensemble, function, judge, process, reward_model, world  # noqa: F401
from rlhf_lightning.rollouts import advantages, group_advantages, kl_control, selection  # noqa: F401

COMMANDS: dict[str, Callable[..., Any]] = {name: resolve_name(path) for name, path in registry.COMMANDS.items()}
FIT_COMMANDS: dict[str, Callable[..., None]] = {n: resolve_name(path) for n, path in registry.FIT_COMMANDS.items()}


class TrainerParser(OneLineErrors, LightningArgumentParser):
    """For fit, validate, test and predict."""


class RLHFCLI(LightningCLI):
    """LightningCLI with a run folder that holds everything, loggers that need no account, and an export at the end."""

    run_folder: RunFolder
    typed: tuple[ArgumentParser, list[str]]  # the parser of the command, and the command line without it

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, flag in RUN_FLAGS.items():
            parser.add_argument(f"--{name}", **flag)
        for key, path in RUN_CLASSES.items():
            parser.add_lightning_class_args(resolve_name(path), key)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command, *rest = args
        self.typed = self._subcommand_parsers.get(command, parser), rest
        if wants_help(rest):
            print(help_page(command, *self.typed))
            raise SystemExit(0)
        with keys_as_typed(*self.typed):
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """The command line wins over what a checkpoint remembers; our checkpoints hold no hyper-parameters at all."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_imports(config)
        check_checkpoint(config)
        root = config.trainer.default_root_dir or f"runs/{_short_name(config.model.class_path)}"
        config.trainer.default_root_dir = str(root)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(root, "checkpoints"))
        limits = (config.trainer.max_epochs, config.trainer.max_time)
        if config.trainer.max_steps == -1 and limits == (None, None):
            # Iterations may take any number of epochs. Otherwise one: Lightning's default is a thousand.
            config.trainer.max_epochs = -1 if (config.model.get("init_args") or {}).get("iterations") else 1
        self._check_loggers(config)
        self.run_folder = RunFolder(root)
        lines = PredictionLines.path(root)
        if self.subcommand == "predict" and lines.exists() and not config.overwrite:
            raise UserError(
                f"{lines} exists; replace it with --overwrite true, or give another --trainer.default_root_dir"
            )
        resumed = self._checked_checkpoint(config)
        if self.subcommand == "fit":
            self.run_folder.claim(resuming=resumed, overwrite=config.overwrite)
            self.run_folder.clear_up()

    def _check_loggers(self, config: Any) -> None:
        """A logger whose package is missing is found before anything is built."""
        given = config.trainer.logger
        if self.subcommand != "fit" or given is False:
            return
        if given in (None, True):
            given = [] if config.wandb == "disabled" else [{"class_path": "WandbLogger"}]
        for logger in given if isinstance(given, list) else [given]:
            check_installed(str(logger["class_path"]))

    def _checked_checkpoint(self, config: Any) -> bool:
        """Whether there is one to go on from; a damaged one is found before anything is built."""
        if config.get("ckpt_path") is None:
            return False
        last = Path(config.checkpoint.dirpath, LAST)
        if config.ckpt_path == "last" and not last.is_file():
            raise UserError(f"--ckpt_path last: there is no {last}; leave the flag out to begin a run")
        path = last if config.ckpt_path == "last" else Path(config.ckpt_path)
        if path.is_file():
            check_sound(path, every_shard=False)  # of those the ranks share the work when they load
        return True

    def instantiate_classes(self) -> None:
        with users_mistakes(*self.typed):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config[self.subcommand]
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif config.trainer.logger is not False:
            kwargs["logger"] = self._loggers(config)
        own = [
            ForgetFailedStart(self.run_folder),
            PredictionLines(),
            RunState(),
            FinalValidation(),
            SaveBeforeMeasuring(),
        ]
        self.trainer_defaults["callbacks"] = own
        if config.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(RunProgress())
        given = self.config_init[self.subcommand].trainer.plugins or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFiles(self.model)]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:  # about names such as that of a strategy
            if first_process():
                self.run_folder.abandon()
            raise UserError(f"trainer: {one_line(str(error))}") from error

    def after_fit(self) -> None:
        given = self.config[self.subcommand].get("config") or []
        print_result(self.trainer, self.model, [Path(str(path)) for path in given])

    def _run_subcommand(self, subcommand: str) -> None:
        with kept_training(self.trainer), lost_ranks():
            super()._run_subcommand(subcommand)

    def _loggers(self, config: Any) -> list[Logger]:
        """metrics.csv in the run's folder, and the loggers that were given, else W&B: offline unless asked otherwise."""
        folder = config.trainer.default_root_dir
        given = self.config_init[self.subcommand].trainer.logger
        if given in (None, True):
            online, group, tags = config.wandb == "online", config.wandb_group, config.wandb_tags
            given = [] if config.wandb == "disabled" else [wandb_logger(folder, online, group, tags)]
        given = given if isinstance(given, list) else [given]
        continue_wandb(given, folder)
        return run_loggers(RunMetrics(folder), given)


class BuildOnly(RLHFCLI):
    """Makes what the configuration describes, and runs nothing."""

    built: Any

    def before_instantiate_classes(self) -> None:
        check_imports(self.config[self.subcommand])

    def instantiate_classes(self) -> None:
        with users_mistakes(*self.typed):
            self.built = self.parser.instantiate_classes(self.config)[self.subcommand]

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build_fit(args: list[str]) -> tuple[Any, Any]:
    """The configuration of a ``fit`` with these arguments, and the objects that it describes: model, data, callbacks."""
    cli: Any = run_trainer(["fit", *args], BuildOnly)
    return cli.config.fit, cli.built


def run_trainer(args: list[str], kind: type[RLHFCLI] = RLHFCLI) -> RLHFCLI:
    """Parse and run one of Lightning's commands.

    Args:
        args: As on the command line, the command first.
        kind: What runs it.

    Raises:
        UserError: For what the user can put right.
    """
    return kind(
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
    parser = command_parser(name, function_)
    if wants_help(args):
        print(help_page(name, parser, args))
        raise SystemExit(0)
    with keys_as_typed(parser, args):
        parsed = parser.parse_args(args)
    check_imports(parsed)
    with users_mistakes(parser, args):
        init = parser.instantiate_classes(parsed)
    init.pop("config", None)
    function_(**init)


def main(args: list[str] | None = None) -> None:
    """Entry point of Python code: exit code 0, or 2 and one line for a user's mistake."""
    args = list(sys.argv[1:] if args is None else args)
    with reported():
        if answered(args):
            return
    run(args)


def run(args: list[str]) -> None:
    """Run a command line that :func:`.answered` has left something of.

    Args:
        args: As typed, the command first.
    """
    be_quiet()
    with reported():
        try:
            name, *rest = take_imports(args)
            if name in COMMANDS:
                run_command(name, rest)
            elif name in FIT_COMMANDS:
                FIT_COMMANDS[name](rest, build_fit)
            else:
                run_trainer([name, *rest])
        except RunStopped as stop:
            _say_how_to_go_on(str(stop), args)
        except MisconfigurationException as error:
            raise UserError(one_line(str(error))) from error


@rank_zero_only
def _say_how_to_go_on(stopped: str, args: list[str]) -> None:
    imports = [part for name in POLICY.given for part in (FLAG, name)]
    last = ["--ckpt_path", "last"] if args[0] in TRAINER_COMMANDS else []
    command = ["python", "-m", "rlhf_lightning", *without_option(args, "--ckpt_path"), *imports, *last]
    print(f"{stopped}; go on with: {shlex.join(command)}")


def without_option(args: list[str], name: str) -> list[str]:
    """A command line without an option and its value, written with a blank or with an equals sign."""
    pairs = zip(["", *args], args, strict=False)
    return [word for before, word in pairs if name not in (before, word) and not word.startswith(f"{name}=")]


def _short_name(class_path: str) -> str:
    name = class_path.rsplit(".", 1)[-1].removesuffix("Module")
    return "".join(
        f"_{c.lower()}" if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name)
    )
