"""report.json for programs, report/index.html for people (one page that needs nothing beside it), a table in the terminal."""

import csv
import io
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf_lightning import __version__
from rlhf_lightning.errors import harmless
from rlhf_lightning.models.export import replace_file

# What is drawn of each stage's metrics.csv, if it is there: title, and columns of the same unit.
CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("train/loss", "eval/loss")),
    ("accuracy", ("train/accuracy", "eval/accuracy", "train/rewards/accuracies", "eval/rewards/accuracies")),
    ("reward", ("train/objective/scores", "eval/sampled/score", "eval/greedy/score")),
    ("implicit reward", ("train/rewards/chosen", "train/rewards/rejected", "train/rewards/margins")),
    ("KL, nats a response", ("train/objective/kl", "eval/sampled/kl")),
    ("response length, tokens", ("train/objective/length", "eval/sampled/length")),
    ("entropy, nats a token", ("train/policy/entropy_avg", "train/entropy", "eval/entropy")),
    ("critic's explained variance", ("train/val/explained_variance",)),
)


def write_report(report: dict[str, Any], folder: Path, stages: list[str]) -> Path:
    """Write both files and print the table.

    Args:
        report: What was measured.
        folder: Of the pipeline; each stage's ``metrics.csv`` is in it.
        stages: Names, in order.

    Returns:
        The page.
    """
    report = {
        **report,
        "versions": {
            "rlhf_lightning": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
        },
    }
    replace_file(folder / "report.json", json.dumps(report, indent=2, allow_nan=False))
    curves = {stage: stage_curves(folder / stage / "metrics.csv") for stage in stages}
    page = render(report, curves)
    (folder / "report").mkdir(exist_ok=True)
    replace_file(folder / "report" / "index.html", page)
    print_table(report)
    return folder / "report" / "index.html"


def render(report: dict[str, Any], curves: dict[str, list[Markup]]) -> str:
    """The page; text is escaped, and what is not printable in it is shown as its code.

    Args:
        report: What was measured.
        curves: SVGs by stage.
    """
    environment = Environment(
        loader=PackageLoader("rlhf_lightning.evaluation", "."),
        autoescape=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    return environment.get_template("report.html").render(report=report, curves=curves, where=where_columns(report))


def where_columns(report: dict[str, Any]) -> list[str]:
    """The "split/mode" keys that the policies were measured at, in order."""
    first: dict[str, Any] = next(iter(report.get("policies", {}).values()), {})
    return list(first)


def stage_curves(path: Path) -> list[Markup]:
    """One small SVG a title of ``CURVES`` for which the file has columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = []
    for title, columns in CURVES:
        series = {name: points(rows, name) for name in columns if rows and name in rows[0]}
        series = {name: xy for name, xy in series.items() if xy[0]}
        if series:
            drawn.append(line_chart(title, series))
    return drawn


def points(rows: Iterable[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column, where it has a value."""
    known = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [step for step, _ in known], [value for _, value in known]


def line_chart(title: str, series: dict[str, tuple[list[int], list[float]]]) -> Markup:
    """An SVG to stand in a page."""
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (steps, values) in series.items():
        axes.plot(
            steps, values, marker="o" if len(steps) < 5 else None, markersize=3, linewidth=1.4, label=harmless(name)
        )
    axes.set_title(harmless(title), fontsize=9)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6, frameon=False)
    return as_svg(figure)


def as_svg(figure: Figure) -> Markup:
    """A figure as inline SVG."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])


def print_table(report: dict[str, Any]) -> None:
    """The headline: every policy on held-out prompts, and what the methods gained."""
    console = Console()
    table = Table(title="held-out prompts, sampled at temperature 1; 95 % intervals", title_justify="left")
    for column in ("policy", "gold reward", "greedy", "OOD", "gap closed", "win rate", "KL", "length"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, parts in report.get("policies", {}).items():
        compared = report["comparisons"].get(name, {}).get("held_out/sampled", {})
        held_out = parts["held_out/sampled"]
        table.add_row(
            Text(harmless(name)),
            interval(held_out.get("gold") or held_out.get("score")),
            *(mean(parts.get(where, {}).get("gold")) for where in ("held_out/greedy", "ood/sampled")),
            f"{compared['gap_closed']:.0%}" if "gap_closed" in compared else "",
            f"{compared['win_rate']['mean']:.2f}" if compared else "",
            f"{held_out['kl']:.1f}",
            f"{held_out['length']:.1f}",
        )
    if report.get("policies"):
        console.print(table)
    for check in report.get("thresholds", []):
        mark = "[green]ok  [/]" if check["met"] else "[red]miss[/]"
        bounds = " and ".join(f"{s} {check[k]:g}" for k, s in (("low", "at least"), ("high", "at most")) if k in check)
        console.print(f"{mark} {escape(harmless(check['name']))}: {check['value']:.3f} ({bounds})")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())
    console.print(Text(harmless(f"seconds: {seconds}")))


def mean(value: dict[str, float] | None) -> str:
    """A mean, short."""
    return f"{value['mean']:.2f}" if value else ""


def interval(value: dict[str, float] | None) -> str:
    """A mean with its interval, short."""
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]".replace("[", "\\[") if value else ""
