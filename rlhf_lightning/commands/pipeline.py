"""Stages with hand-offs: each a ``fit`` that exports, then an evaluation and a report."""

import json
import logging
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from rlhf_lightning.commands.fit_process import fit_command, run_fit
from rlhf_lightning.commands.handoffs import check_export, check_same_text
from rlhf_lightning.commands.imports import FLAG
from rlhf_lightning.commands.run_folder import CONFIG
from rlhf_lightning.commands.sample import ROWS
from rlhf_lightning.commands.stage_fingerprint import stage_fingerprint
from rlhf_lightning.errors import RunStopped, UserError, harmless
from rlhf_lightning.evaluation.candidates import described
from rlhf_lightning.evaluation.evaluation import Evaluation, WorldEvaluation
from rlhf_lightning.evaluation.leaderboard import leaderboard, write_leaderboard
from rlhf_lightning.evaluation.report import PAGE, ReportSettings, write_report
from rlhf_lightning.evaluation.thresholds import check_names
from rlhf_lightning.models.export import replace_file

log = logging.getLogger(__name__)

RECORD = "stages.json"
console = Console(markup=False)


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline.

    Attributes:
        name: Of the stage and its folder.
        config: YAML files of the command, later ones win.
        inputs: Config keys that receive what an earlier stage made (the export folder of a ``fit``, the rows of a ``sample``):
            ``{key: stage}``.
        options: Further keys, as on the command line: ``{key: value}``.
        command: "fit", or "sample", which draws rows for a later fit.
        seed_keys: Config keys that receive the seed in place of the pipeline's.
    """

    name: str
    config: list[str]
    inputs: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    command: Literal["fit", "sample"] = "fit"
    seed_keys: list[str] | None = None

    @property
    def trains(self) -> bool:
        """Whether it makes a model."""
        return self.command == "fit"

    def product(self, folder: Path) -> Path:
        """What it makes, in the pipeline's folder."""
        return folder / self.name / ("export" if self.trains else ROWS)

    def finished(self, folder: Path) -> bool:
        """Whether that is there, whole."""
        made = self.product(folder)
        return any(made.rglob("*config.json")) if self.trains else made.is_file()


def pipeline(
    stages: list[Stage],
    output: str,
    seed_everything: int = 0,
    seed_keys: list[str] | None = None,
    evaluation: Evaluation | None = None,
    options: dict[str, Any] | None = None,
    overwrite: bool = False,
    seeds: list[int] | None = None,
    report: ReportSettings = ReportSettings(),  # noqa: B008  (frozen)
) -> None:
    """Run stages one after the other, hand each one's export to the next, evaluate, and write a report.

    A stage that has finished with the same settings is skipped; one that was interrupted goes on from its last checkpoint.

    Args:
        stages: In order.
        output: Folder of the whole pipeline; each stage has a folder in it.
        seed_everything: Of every stage.
        seed_keys: Further config keys that receive the seed, for instance that of a world.
        evaluation: What is asked of the exported models at the end.
        options: Config keys for every stage, as on the command line.
        overwrite: Begin stages anew whose settings have changed.
        seeds: Do all of that for each of these instead of ``seed_everything``, in folders of their own, and write a leaderboard
            of the policies.
        report: Title, names and thresholds of the report.

    Raises:
        UserError: If the plan can't be carried out, a stage fails, or a required threshold is missed.
    """
    _check_plan(stages)
    if evaluation is not None:
        evaluation.check()
    check_names(report.thresholds or [], [stage.name for stage in stages])
    run = partial(_run, stages, evaluation=evaluation, report=report, overwrite=overwrite)
    if not seeds:
        _require(run(Path(output), seed_everything, seed_keys or [], options or {}), report)
        return
    if not isinstance(evaluation, WorldEvaluation) or not evaluation.envelope_samples:
        raise UserError(
            "a leaderboard needs gold rewards and an envelope: evaluation WorldEvaluation, envelope_samples 64"
        )
    of_seeds = {seed: Path(output, f"seed_{seed}") for seed in seeds}
    for seed, folder in of_seeds.items():
        console.rule(f"seed {seed}")
        run(folder, seed, seed_keys or [], options or {})
    reports = [json.loads((folder / "report.json").read_text()) for folder in of_seeds.values()]
    console.print(f"leaderboard: {write_leaderboard(leaderboard(reports), Path(output))}")
    for written in reports:
        _require(written, report)


def _run(
    stages: list[Stage],
    folder: Path,
    seed: int,
    seed_keys: list[str],
    options: dict[str, Any],
    *,
    evaluation: Evaluation | None,
    report: ReportSettings,
    overwrite: bool,
) -> dict[str, Any]:
    """Run all stages with one seed, and write their report.

    Returns:
        What is in report.json.
    """
    started = time.perf_counter()
    record = _read_record(folder, {stage.name for stage in stages})
    fingerprints: dict[str, str] = {}
    commands: dict[str, str] = {}
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        arguments = _arguments(stage, folder, seed, seed_keys, options, by_name)
        # A stage is the same wherever the pipeline's folder is.
        elsewhere = _arguments(stage, Path("OUTPUT"), seed, seed_keys, options, by_name)
        upstream = [fingerprints[name] for name in stage.inputs.values()]
        named = (options if stage.trains else {}) | stage.options
        fingerprints[stage.name] = stage_fingerprint(stage.config, elsewhere, named, upstream)
        commands[stage.name] = _shown(fit_command(arguments, stage.command))
        _run_stage(stage, arguments, fingerprints[stage.name], folder, record, overwrite)
        if stage.trains:  # before another stage builds on it
            _check_handoff(stage, {name: by_name[name] for name in stage.inputs.values()}, folder)
            if evaluation is not None:
                config = yaml.safe_load((folder / stage.name / CONFIG).read_text())
                evaluation.check_stage(stage.name, (config.get("data") or {}).get("init_args") or {})
    training = sum(record[stage.name]["seconds"] for stage in stages)
    seconds = {stage.name: round(record[stage.name]["seconds"], 1) for stage in stages} | {
        "training": round(training, 1)
    }
    measured: dict[str, Any] = {"seed": seed, "seconds": seconds}
    with _finished_stages(folder):
        if evaluation is not None:
            console.rule("evaluation")
            measured["evaluation"] = described(evaluation)
            measured |= evaluation.run({stage.name: stage.product(folder) for stage in stages if stage.trains}, seed)
        seconds["total"] = round(time.perf_counter() - started, 1)
        usual = evaluation.thresholds if evaluation is not None else ()
        written = write_report(measured, folder, commands, report, usual)
    console.print(f"report: {folder / PAGE}")
    return written


def _require(written: dict[str, Any], settings: ReportSettings) -> None:
    """Refuse a report whose thresholds are missed, where they are required.

    Raises:
        UserError: Names the thresholds.
    """
    missed = [check["name"] for check in written["thresholds"] if not check["met"]]
    if settings.require_thresholds and missed:
        raise UserError(f"seed {written['seed']}: thresholds missed: {', '.join(missed)}; the report is complete")


def _shown(command: list[str]) -> str:
    """A command line for readers: python instead of the path of the interpreter."""
    return harmless(shlex.join(["python", *command[1:]]))


@contextmanager
def _finished_stages(folder: Path) -> Iterator[None]:
    """Around what follows the stages: its failure says that they are kept, and how to repeat the rest.

    Raises:
        UserError: If it fails.
    """
    try:
        yield
    except Exception as error:  # whatever it is: the stages are finished, and the user must learn that
        if not isinstance(error, UserError):
            log.error("%s", type(error).__name__, exc_info=error)
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{first}; the stages are finished and kept in {folder}: put it right, and the same command does the rest alone"
        ) from error


def _check_plan(stages: list[Stage]) -> None:
    seen: set[str] = set()
    for stage in stages:
        if not re.fullmatch(r"\w[\w.-]*", stage.name):
            raise UserError(
                f"{stage.name!r} can't be a stage's name: it is a folder's too; use letters, digits, _, - and ."
            )
        for config in stage.config:
            if not Path(config).is_file():
                raise UserError(f"stage {stage.name}: {config} does not exist")
        for key, source in stage.inputs.items():
            if source not in seen:
                raise UserError(f"stage {stage.name}: {key} comes from {source!r}, which is no earlier stage")
        if stage.name in seen:
            raise UserError(f"two stages are called {stage.name!r}")
        seen.add(stage.name)
    if not stages:
        raise UserError("a pipeline needs at least one stage")


def _arguments(
    stage: Stage, folder: Path, seed: int, seed_keys: list[str], options: dict[str, Any], by_name: dict[str, Stage]
) -> list[str]:
    """The arguments of ``python -m rlhf_lightning COMMAND``, with what the stages of ``by_name`` make in ``folder``."""
    made = {key: str(by_name[source].product(folder)) for key, source in stage.inputs.items()}
    arguments = [part for config in stage.config for part in ("--config", config)]
    own = str(folder / stage.name)
    settings: dict[str, Any] = {"seed": seed, "output": own}
    if stage.trains:
        settings = {"seed_everything": seed, "trainer.default_root_dir": own} | options
    keys = seed_keys if stage.seed_keys is None else stage.seed_keys
    settings |= dict.fromkeys(keys, seed) | made | stage.options
    arguments += [part for key, value in settings.items() for part in (f"--{key}", json.dumps(value).strip('"'))]
    if any(part.startswith(FLAG) for part in arguments):
        raise UserError(f"stage {stage.name}: {FLAG} stands on the command line, never in a file")
    return arguments


def _run_stage(
    stage: Stage, arguments: list[str], fingerprint: str, folder: Path, record: dict[str, Any], overwrite: bool
) -> None:
    console.rule(stage.name)
    run, known = folder / stage.name, record.get(stage.name, {})
    same = known.get("fingerprint") == fingerprint
    if same and known.get("finished") and stage.finished(folder):
        console.print(f"finished before in {known['seconds']:.0f} s, skipped")
        return
    begun = run.exists() if not stage.trains else (run / CONFIG).exists()
    if begun and not same and not overwrite:
        raise UserError(
            f"{run} holds a run with other settings; give another --output, or --overwrite true to replace it"
        )
    resume = begun and same and (run / "checkpoints" / "last.ckpt").is_file()
    anew = begun and (stage.trains or not same)  # what `sample` has drawn it goes on with by itself
    extra = ["--ckpt_path", "last"] if resume else ["--overwrite", "true"] if anew else []
    command = fit_command([*arguments, *extra], stage.command)
    record[stage.name] = {
        "fingerprint": fingerprint,
        "finished": False,
        "seconds": known.get("seconds", 0.0) if resume else 0.0,
    }
    _write_record(folder, record)
    console.print(_shown(command), style="dim", soft_wrap=True)
    started = time.perf_counter()
    code = run_fit(command)
    record[stage.name]["seconds"] += time.perf_counter() - started
    if code:
        raise UserError(f"stage {stage.name} ended with exit code {code}; put it right and run the same command again")
    if not stage.finished(folder):
        _write_record(folder, record)
        raise RunStopped(f"stage {stage.name} was stopped before its end")
    record[stage.name]["finished"] = True
    _write_record(folder, record)


def _check_handoff(stage: Stage, sources: dict[str, Stage], folder: Path) -> None:
    """What a stage made, and that it reads text as the stages do that it was made from."""
    made = stage.product(folder)
    console.print(f"hand-off of {stage.name}: {check_export(made)}")
    for name in sorted(name for name, source in sources.items() if source.trains):
        check_same_text(sources[name].product(folder), made)
        console.print(f"{name} -> {stage.name}: same tokenizer, same template")


def _read_record(folder: Path, stages: set[str]) -> dict[str, Any]:
    path = folder / RECORD
    if folder.exists() and not path.exists() and any(found.name not in stages for found in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no pipeline; give another --output")
    return json.loads(path.read_text()) if path.exists() else {}


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / RECORD, json.dumps(record, indent=2))
