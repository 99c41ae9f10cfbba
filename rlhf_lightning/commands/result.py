"""What a fit prints at its end: metrics before and after, where the export is, and the next command."""

import os
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from rlhf_lightning.callbacks.export import ExportAtEnd
from rlhf_lightning.callbacks.run_state import metrics_files
from rlhf_lightning.commands.fit_process import IN_PIPELINE
from rlhf_lightning.errors import harmless

OWN = Path("configs", "recipes")  # the recipes for the user's own model and data
PLACEHOLDER = re.compile(r"source: path/to/(\w+)(\.\w+)?")


class Change(NamedTuple):
    """A metric's first and last value, and the optimizer steps at which they were logged."""

    name: str
    first: float
    first_step: int
    last: float
    last_step: int


def print_result(trainer: Trainer, module: Any, configs: list[Path]) -> None:
    """Print the result of a finished fit; only the first rank prints.

    Args:
        trainer: Its fit is over.
        module: The trained module.
        configs: Configuration files of the run.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    exports = [callback.exported for callback in callbacks if isinstance(callback, ExportAtEnd) and callback.exported]
    if not trainer.is_global_zero or not exports:  # fast_dev_run exports nothing
        return
    console = Console(markup=False, highlight=False)
    shown = [str(name) for name in trainer.progress_bar_metrics]
    rows = [row for logger in metrics_files(trainer) for row in logger.rows()]
    if changes := changes_of(rows, shown):
        console.print(as_table(changes))
    for export, best in exports:
        console.print(harmless(f"export: {export}" + (f" (best: {best})" if best else "")), soft_wrap=True)
        commands = [] if IN_PIPELINE in os.environ else next_commands(module, str(export), configs)
        for title, command in zip(["next:", *[" or:"] * len(commands)], commands, strict=False):
            console.print(f"{title} {harmless(shlex.join(command))}", soft_wrap=True)


def changes_of(rows: list[dict[str, str]], shown: list[str]) -> list[Change]:
    """First and last values of all ``eval/`` metrics, and of the training metrics that the progress bar shows.

    Args:
        rows: Those of metrics.csv.
        shown: Last parts of the training metrics' names.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        for name, value in row.items():
            if value and (name.startswith("eval/") or (name.startswith("train/") and name.split("/")[-1] in shown)):
                found.setdefault(name, []).append((float(value), int(float(row["step"]))))
    return [Change(name, *values[0], *values[-1]) for name, values in sorted(found.items())]


def as_table(changes: list[Change]) -> Table:
    """Metrics as rows; validations before training are in the column of step 0."""
    evals = [change for change in changes if change.name.startswith("eval/")] or changes
    first, last = min(change.first_step for change in evals), max(change.last_step for change in evals)
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("metric", overflow="fold")
    for title in (f"step {first}" if first < last else "", f"step {last}", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    for change in changes:
        once = change.first_step == change.last_step
        difference = "" if once else f"{change.last - change.first:+.4g}"
        table.add_row(harmless(change.name), "" if once else f"{change.first:.4g}", f"{change.last:.4g}", difference)
    return table


def next_commands(module: Any, export: str, configs: list[Path]) -> list[list[str]]:
    """The commands that usually follow a run, the most usual one first.

    Args:
        module: The trained module.
        export: Folder that the run exported to; one without a model of its own, such as an adapter alone, has none.
        configs: Configuration files of the run.
    """
    if not Path(export, "config.json").is_file():
        return []
    method, start = type(module).__name__, getattr(module, "model_path", None)
    if method == "RewardModelModule":
        own = {"model.policy.path": start or "POLICY", "model.critic.path": export, "model.reward.path": export}
        return fit_commands("reward", "ppo", own, configs)
    if method == "ProcessRewardModule":
        return []
    chat = ["python", "-m", "rlhf_lightning", "chat", "--model", export]
    if method == "SFTModule":
        return [*fit_commands("sft", "reward", {"model.network.path": export}, configs), chat]
    return [[*chat, "--against", start] if start else chat]


def fit_commands(method: str, following: str, settings: dict[str, str], configs: list[Path]) -> list[list[str]]:
    """The fit that follows, by the config of the same family: ``own_ppo.yaml`` after ``own_reward.yaml``.

    Args:
        method: Of this run, as configs are named.
        following: The method that follows.
        settings: Keys of the command.
        configs: Of this run; where none has such a sibling, the recipe for own models and data is named.

    Returns:
        One command, or none where no such config is found.
    """
    siblings = [path.with_name(f"{path.stem.removesuffix(method)}{following}.yaml") for path in configs[::-1]]
    siblings = [new for new, old in zip(siblings, configs[::-1], strict=True) if old.stem.endswith(method)]
    config = next((path for path in [*siblings, OWN / f"own_{following}.yaml"] if path.is_file()), None)
    if config is None:
        return []
    command = ["python", "-m", "rlhf_lightning", "fit", "-c", str(config)]
    command += [part for key, value in settings.items() for part in (f"--{key}", value)]
    if data := PLACEHOLDER.search(config.read_text()):
        command += ["--data.source", f"{data[1].upper()}{data[2] or ''}"]
    return [command]
