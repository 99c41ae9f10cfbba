"""Train on problems whose optimum is known, and say how far from it the training ended."""

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from rlhf_lightning.commands.fit_process import fit_command, run_fit
from rlhf_lightning.errors import RunStopped, UserError
from rlhf_lightning.evaluation.exact import Target, policy_logps, target_of
from rlhf_lightning.evaluation.gradients import gradient_error
from rlhf_lightning.evaluation.ground_truth import REPORT, OptimumCurve, read_curve, table, verdict, write
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import GRPOModule, PPOModule

Parse = Callable[[list[str]], tuple[Any, Any]]
console = Console()


def ground_truth(args: list[str], parse: Parse) -> None:
    """Train on enumerable problems and say how far from the known optimum it ends.

    For each problem a ``fit`` with these very files and flags, beside which only the seed of the world, the policy (the
    world's reference) and the folder are given. The table, ``ground_truth.json`` and ``ground_truth.png`` land in
    ``trainer.default_root_dir``. Exit code 1 if a problem is out of tolerance.

    Args:
        args: Of ``fit``, and ``--problems`` with seeds of the world.
        parse: From arguments of ``fit`` to its configuration and what that makes.

    Raises:
        UserError: If there is no optimum to compare with, a ``fit`` fails, or the folder holds another run.
    """
    own, rest = _parser().parse_known_args(args)
    config, built = parse(rest)
    _check(config, built)
    folder = Path(config.trainer.default_root_dir or "runs/ground_truth")
    _claim(folder, config.overwrite)
    report: dict[str, Any] = {"arguments": rest, "problems": []}
    targets = []
    for problem in own.problems:
        console.rule(f"problem {problem}")
        found, target = _problem(problem, rest, folder / f"problem_{problem}", parse)
        report |= {"method": target.method, "beta": target.beta}
        report["problems"].append(found)
        targets.append(target)
        write(report, targets, folder)
    print(table(report))
    print(f"report: {folder / REPORT}")
    if any(problem["out_of_tolerance"] for problem in report["problems"]):
        raise SystemExit(1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"ground-truth: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rlhf_lightning ground-truth",
        description=(ground_truth.__doc__ or "").split("Args:")[0],
        epilog="All other arguments are those of fit.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--problems", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="Seeds of the world, a run each."
    )
    return parser


def _check(config: Any, built: Any) -> None:
    """Whatever would show only after a training, now."""
    target_of(built.model, built.data.source)
    if not any(isinstance(callback, OptimumCurve) for callback in built.trainer.callbacks or []):
        raise UserError(
            "trainer.callbacks holds no OptimumCurve: add {class_path: OptimumCurve}, or no curve can be drawn"
        )
    if config.get("ckpt_path") is not None:
        raise UserError("ground-truth trains several problems from their beginnings; leave --ckpt_path out")


def _claim(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = folder.is_dir() and all(f.name.startswith(("problem_", "ground_truth.")) for f in folder.iterdir())
    if not ours:
        raise UserError(f"{folder} is not empty and holds no ground-truth run; give another --trainer.default_root_dir")
    if not overwrite:
        raise UserError(
            f"{folder} holds another run; replace it (--overwrite true) or give another folder (--trainer.default_root_dir)"
        )
    shutil.rmtree(folder)


def _problem(seed: int, rest: list[str], folder: Path, parse: Parse) -> tuple[dict[str, Any], Target]:
    """Train on one problem; its figures and its target."""
    started = time.perf_counter()
    reference, run = folder / "reference", folder / "run"
    flags = {
        "model.init_args.policy.path": reference,
        "data.init_args.source.init_args.seed": seed,
        "trainer.default_root_dir": run,
    }
    _, built = parse(rest)
    if isinstance(built.model, PPOModule | GRPOModule):
        flags["model.init_args.reward.init_args.world.init_args.seed"] = seed
    arguments = [*rest, *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]
    module, world = _built(arguments, parse)
    target = target_of(module, world)
    export_folder(world.reference(), world.tokenizer(), reference)
    module.configure_model()
    error = gradient_error(module, world, target)
    _fit(arguments, seed, run)
    policy = PolicyNetwork(load_causal_lm(ModelSpec(path=str(run / "export")), world.tokenizer()))
    with torch.no_grad():
        final = target.exact(policy_logps(policy, world, target.temperature))
    return {
        "problem": seed,
        "final": asdict(final),
        "gradient_error": error,
        "out_of_tolerance": verdict(target.method, final, error),
        "seconds": round(time.perf_counter() - started, 1),
        "target": target.summary(),
        "curve": read_curve(run / "metrics.csv"),
    }, target


def _built(arguments: list[str], parse: Parse) -> tuple[Any, Any]:
    _, built = parse(arguments)
    return built.model, built.data.source


def _fit(arguments: list[str], seed: int, run: Path) -> None:
    """In a process of its own: a fresh generator, and the same way as everybody's."""
    code = run_fit(fit_command(arguments))
    if code:
        raise UserError(
            f"problem {seed}: the fit ended with exit code {code}; put it right and run the same command again"
        )
    if not (run / "export" / "config.json").is_file():
        raise RunStopped(f"problem {seed} was stopped before its end; problems begin anew (add --overwrite true)")
