"""report.json for programs, report/index.html for people (one page that needs nothing beside it), a table in the terminal."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf_lightning import __version__
from rlhf_lightning.errors import harmless
from rlhf_lightning.evaluation.charts import reward_against_kl, stage_curves
from rlhf_lightning.evaluation.glossary import anchor, explained
from rlhf_lightning.evaluation.headline import headline, main_condition, number, reward_of
from rlhf_lightning.evaluation.tables import condition_title, detail_tables, terminal_table
from rlhf_lightning.evaluation.thresholds import Threshold, check_thresholds, in_words
from rlhf_lightning.models.export import replace_file

PAGE = Path("report", "index.html")
CONFIGS = ("config.yaml", "settings.json")  # of a fit, and of a sample


@dataclass(frozen=True)
class ReportSettings:
    """Title, names and thresholds of a report.

    Attributes:
        title: Heading of the page; None for the name of the pipeline's folder.
        reward: Name of the reward in text, tables and the figure; None for what the evaluation calls it.
        thresholds: Figures that a good run reaches, marked as met or missed; None for those of the evaluation.
        require_thresholds: End the command with exit code 2 if a threshold is missed.
    """

    title: str | None = None
    reward: str | None = None
    thresholds: list[Threshold] | None = None
    require_thresholds: bool = False


def write_report(
    measured: dict[str, Any],
    folder: Path,
    commands: dict[str, str],
    settings: ReportSettings = ReportSettings(),
    usual_thresholds: Sequence[Threshold] = (),
) -> dict[str, Any]:
    """Write both files and print the headline and the table.

    Args:
        measured: What the pipeline and its evaluation measured.
        folder: Of the pipeline; each stage's ``metrics.csv`` and config are in it.
        commands: Command line of each stage, in order.
        settings: What the user chose.
        usual_thresholds: Those of the evaluation, for settings without any; the ones that it did not measure are dropped.

    Returns:
        What is in report.json.
    """
    report = completed(measured, folder, commands, settings, usual_thresholds)
    replace_file(folder / "report.json", json.dumps(report, indent=2, allow_nan=False))
    configs = {stage: text for stage in commands if (text := _config_of(folder / stage))}
    curves = {stage: stage_curves(folder / stage / "metrics.csv") for stage in commands}
    page = render(report, curves, configs)
    (folder / PAGE).parent.mkdir(exist_ok=True)
    replace_file(folder / PAGE, page)
    print_report(report)
    return report


def completed(
    measured: dict[str, Any],
    folder: Path,
    commands: dict[str, str],
    settings: ReportSettings,
    usual_thresholds: Sequence[Threshold],
) -> dict[str, Any]:
    """What was measured, with everything else that the page shows."""
    report: dict[str, Any] = {"title": settings.title or f"Pipeline {folder.resolve().name}", **measured}
    if main_condition(report) is not None:
        report["reward"] = reward_of(report) | ({"name": settings.reward} if settings.reward else {})
    chosen = settings.thresholds
    checked = check_thresholds(usual_thresholds if chosen is None else chosen, report, skip_missing=chosen is None)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return report | {
        "headline": headline(report),
        "thresholds": checked,
        "stages": [{"name": name, "command": command} for name, command in commands.items()],
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "versions": {
            "rlhf_lightning": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "machine": platform.machine(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
            "gpus": gpus,
        },
    }


def _config_of(stage: Path) -> str | None:
    return next((path.read_text(encoding="utf-8") for name in CONFIGS if (path := stage / name).is_file()), None)


def render(report: dict[str, Any], curves: dict[str, list[Markup]], configs: dict[str, str] | None = None) -> str:
    """The page; text is escaped, and what is not printable in it is shown as its code.

    Args:
        report: What is in report.json.
        curves: SVGs by stage.
        configs: Text of the config of each stage.
    """
    environment = Environment(
        loader=PackageLoader("rlhf_lightning.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    environment.globals |= {"anchor": anchor, "in_words": in_words, "number": number}
    tables = detail_tables(report)
    condition = main_condition(report)
    return environment.get_template("report.html").render(
        report=report,
        reward=reward_of(report),
        figure=main_figure(report),
        where=condition_title(report, condition) if condition else None,
        curves={stage: charts for stage, charts in curves.items() if charts},
        tables=tables,
        configs=configs or {},
        glossary=explained(
            _terms(report, [column.term for _, group in tables for table in group for column in table.columns])
        ),
    )


def main_figure(report: dict[str, Any]) -> Markup | None:
    """Reward against KL of all policies at the main condition; None where one of the two was not measured."""
    condition, reward = main_condition(report), reward_of(report)
    points = {}
    for name, parts in report.get("policies", {}).items():
        part = parts.get(condition, {})
        if reward["figure"] in part and "kl" in part:
            kl = {"mean": part["kl"], "low": part["kl"], "high": part["kl"]} | part.get("kl_interval", {})
            points[name] = {"kl": kl, "reward": part[reward["figure"]]}
    return reward_against_kl(points, reward["name"], report.get("envelope")) if points else None


def _terms(report: dict[str, Any], columns: list[str | None]) -> set[str]:
    """Terms that occur in the page."""
    conditions: dict[str, Any] = next(iter(report.get("policies", {}).values()), {})
    found = {term for term in columns if term}
    for condition in conditions:
        split, _, mode = condition.partition("/")
        found |= {{"held_out": "held-out", "ood": "out of distribution"}.get(split, split), mode}
    return (
        found
        | ({"95 % interval", "KL"} if conditions else set())
        | ({"best of n"} if report.get("best_of_n") else set())
    )


def print_report(report: dict[str, Any]) -> None:
    """The headline, the table of policies, and which thresholds are met."""
    console = Console()
    if report.get("headline"):
        console.print(Text(harmless(report["headline"])))
    if report.get("policies"):
        figures = terminal_table(report)
        table = Table(title=Text(harmless(figures.caption)), title_justify="left")
        table.add_column(figures.corner)
        for column in figures.columns:
            table.add_column(Text(harmless(column.title)), justify="right")
        for i, name in enumerate(figures.names):
            table.add_row(Text(harmless(name)), *(Text(column.cells[i]) for column in figures.columns))
        console.print(table)
    for check in report.get("thresholds", []):
        mark = "[green]met   [/]" if check["met"] else "[red]missed[/]"
        value = "not measured" if check["value"] is None else number(check["value"], 3)
        console.print(f"{mark} {escape(harmless(check['name']))}: {value} ({in_words(check)})")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())
    console.print(Text(harmless(f"seconds: {seconds}")))
