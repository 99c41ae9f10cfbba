"""The command line: Lightning's fit, validate, test and predict, and the commands beside them."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning import losses, modules, rewards, rollouts, worlds  # noqa: F401  (short class names in YAML)
from rlhf_lightning.callbacks.checkpoint_file import LAST, WholeFiles, check_sound
from rlhf_lightning.callbacks.export import ExportAtEnd
from rlhf_lightning.callbacks.final_validation import FinalValidation
from rlhf_lightning.callbacks.heartbeat import Heartbeat, lost_ranks
from rlhf_lightning.callbacks.kept_training import SaveBeforeMeasuring, kept_training
from rlhf_lightning.callbacks.loggers import check_installed, continue_wandb, run_loggers, wandb_logger
from rlhf_lightning.callbacks.metrics_file import RunMetrics
from rlhf_lightning.callbacks.predictions import PredictionLines
from rlhf_lightning.callbacks.progress import RunProgress
from rlhf_lightning.callbacks.run_checkpoint import RunCheckpoint
from rlhf_lightning.callbacks.run_state import RunState
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.commands.average import average
from rlhf_lightning.commands.chat import chat
from rlhf_lightning.commands.export import export
from rlhf_lightning.commands.fixed_points import fixed_points
from rlhf_lightning.commands.ground_truth import ground_truth
from rlhf_lightning.commands.imports import FLAG, POLICY, check_checkpoint, check_imports, take_imports
from rlhf_lightning.commands.parser import CommandParser, TrainerParser, keys_as_typed, one_line, users_mistakes
from rlhf_lightning.commands.pipeline import pipeline
from rlhf_lightning.commands.quiet import be_quiet
from rlhf_lightning.commands.result import print_result
from rlhf_lightning.commands.run_folder import ForgetFailedStart, RunFolder, SaveRunConfig, first_process
from rlhf_lightning.commands.sample import sample
from rlhf_lightning.data import message_trees  # noqa: F401
from rlhf_lightning.data.corrupted_steps import CorruptedSteps  # noqa: F401
from rlhf_lightning.data.demonstrations import DemonstrationDataModule  # noqa: F401
from rlhf_lightning.data.preferences import PreferenceDataModule  # noqa: F401
from rlhf_lightning.data.pretraining import PretrainingMixDataModule  # noqa: F401
from rlhf_lightning.data.prompts import PromptDataModule  # noqa: F401
from rlhf_lightning.data.rankings import RankingDataModule  # noqa: F401
from rlhf_lightning.data.stepwise import StepwiseDataModule  # noqa: F401
from rlhf_lightning.data.unpaired import UnpairedDataModule  # noqa: F401
from rlhf_lightning.errors import RunStopped, UserError, harmless
from rlhf_lightning.evaluation import evaluation  # noqa: F401
from rlhf_lightning.generation import native, transformers_engine, vllm_engine, vllm_server  # noqa: F401
from rlhf_lightning.modules import strategies, tensor_parallel, zero  # noqa: F401
from rlhf_lightning.rewards import composite, ensemble, function, judge, process, reward_model, world  # noqa: F401
from rlhf_lightning.rollouts import advantages, group_advantages, kl_control, selection  # noqa: F401

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS: dict[str, Callable[..., Any]] = {
    "pipeline": pipeline,
    "export": export,
    "chat": chat,
    "average": average,
    "sample": sample,
    "fixed-points": fixed_points,
}
FIT_COMMANDS: dict[str, Callable[..., None]] = {"ground-truth": ground_truth}  # take the files and flags of fit


class RLHFCLI(LightningCLI):
    """LightningCLI with a run folder that holds everything, loggers that need no account, and an export at the end."""

    run_folder: RunFolder

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--wandb", type=Literal["offline", "online", "disabled"], default="offline", help="Where W&B metrics go."
        )
        parser.add_argument("--wandb_group", type=str | None, default=None, help="W&B group of the run.")
        parser.add_argument("--wandb_tags", type=list[str] | None, default=None, help="W&B tags of the run.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run that the folder holds.")
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(ExportAtEnd, "export")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Heartbeat, "heartbeat")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command, *rest = args
        with keys_as_typed(self._subcommand_parsers.get(command, parser), rest):
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
        with users_mistakes():
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
        with users_mistakes():
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
    parser = CommandParser(prog=f"rlhf_lightning {name}", description=(function_.__doc__ or "").split("\n")[0])
    parser.add_argument("-c", "--config", action="config", help="Path to a configuration file.")
    parser.add_function_arguments(function_, fail_untyped=True, sub_configs=True)
    with keys_as_typed(parser, args):
        parsed = parser.parse_args(args)
    check_imports(parsed)
    with users_mistakes():
        init = parser.instantiate_classes(parsed)
    init.pop("config", None)
    function_(**init)


def main(args: list[str] | None = None) -> None:
    """Entry point: exit code 0, or 2 and one line for a user's mistake."""
    args = list(sys.argv[1:] if args is None else args)
    be_quiet()
    try:
        args = take_imports(args)
        if args and args[0] in COMMANDS:
            run_command(args[0], args[1:])
        elif args and args[0] in TRAINER_COMMANDS:
            run_trainer(args)
        elif args and args[0] in FIT_COMMANDS:
            FIT_COMMANDS[args[0]](args[1:], build_fit)
        else:
            _usage(args)
    except RunStopped as stop:
        _say_how_to_go_on(str(stop), args)
    except (UserError, MisconfigurationException) as error:
        lines = error.lines if isinstance(error, UserError) else [harmless(one_line(str(error)))]
        print("error: " + "\n".join(lines), file=sys.stderr)
        raise SystemExit(2) from None


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


def _usage(args: list[str]) -> None:
    print("usage: python -m rlhf_lightning COMMAND [-c CONFIG ...] [--KEY VALUE ...]\n")
    for name in TRAINER_COMMANDS:
        print(f"  {name:<12} {(getattr(pl.Trainer, name).__doc__ or '').strip().splitlines()[0]}")
    for name, function_ in (COMMANDS | FIT_COMMANDS).items():
        print(f"  {name:<12} {(function_.__doc__ or '').strip().splitlines()[0]}")
    print("\nCOMMAND --help lists its keys. --import MODULE (or FILE.py), here alone, lets a config use what is in it.")
    if args not in ([], ["-h"], ["--help"]):
        raise UserError(f"{args[0]!r} is not a command")


def _short_name(class_path: str) -> str:
    name = class_path.rsplit(".", 1)[-1].removesuffix("Module")
    return "".join(
        f"_{c.lower()}" if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name)
    )
