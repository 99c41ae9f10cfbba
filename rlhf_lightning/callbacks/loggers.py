"""Loggers that talk to a server must not end a run when the server is gone; ``metrics.csv`` has every row in any case."""

import logging
import os
import secrets
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.errors import UserError, harmless

log = logging.getLogger(__name__)

PAUSE = (
    60.0  # seconds after a failure in which a server is not asked again: each try may take its client's whole timeout
)
# Whose exceptions say that a server did not answer as it should; those of sockets and of requests are OSErrors.
CLIENTS = ("mlflow", "wandb", "comet_ml", "neptune", "urllib3", "httpx", "grpc")


class WandbRun(WandbLogger):
    """Lightning's W&B logger, which goes on offline where the server can't be reached when the run begins."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run.

        Raises:
            UserError: If no API key is configured.
        """
        import wandb  # a second, which other loggers do not need
        from wandb.errors import Error, UsageError

        try:
            return WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]
        except UsageError as error:
            raise UserError(f"W&B: {error}; or keep the metrics here with --wandb offline") from error
        except Error as error:
            reason = (str(error).strip().splitlines() or [""])[0]
        self._offline, self._wandb_init["mode"] = True, "offline"
        wandb.teardown()  # its service keeps the id of the run that failed as one in use
        run = WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]
        log.warning(
            "W&B can't be reached (%s); the run is kept here and can be sent later: wandb sync %s",
            harmless(reason),
            run.settings.sync_dir,
        )
        return run


class Tolerant(Logger):
    """Hands everything on to a logger. What it raises because of a server is told once, and the run goes on."""

    def __init__(self, inner: Logger) -> None:
        """Args: the logger that may fail."""
        super().__init__()
        self.inner = inner
        self._failures, self._again = 0, 0.0

    @property
    def name(self) -> str | None:
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        return self.inner.version

    @property
    def save_dir(self) -> str | None:
        return self.inner.save_dir

    @property
    def root_dir(self) -> str | None:
        return self.inner.root_dir

    @property
    def log_dir(self) -> str | None:
        return self.inner.log_dir

    @property
    def experiment(self) -> Any:
        """The inner one's own."""
        return getattr(self.inner, "experiment", None)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._tell("log_metrics", metrics, step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._tell("log_hyperparams", params, *args, **kwargs)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self._tell("log_graph", model, input_array)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self._tell("after_save_checkpoint", checkpoint_callback)

    def save(self) -> None:
        self._tell("save")

    def finalize(self, status: str) -> None:
        self._again = 0.0  # a last chance to send what is left
        try:
            self._tell("finalize", status)
        except Exception as error:  # the run is over and exported: no failure here makes it a failed run
            log.warning("%s could not be closed; metrics.csv has every row", type(self.inner).__name__, exc_info=error)
        if self._failures:
            log.warning("%s: %d calls failed or were left out", type(self.inner).__name__, self._failures)

    def log_text(self, *args: Any, **kwargs: Any) -> None:
        """A table of text, for loggers that have one."""
        self._tell("log_text", *args, **kwargs)

    def _tell(self, what: str, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() < self._again:
            self._failures += 1
            return
        with self:
            call: Callable[..., None] = getattr(self.inner, what)
            call(*args, **kwargs)

    def __enter__(self) -> None:
        """Nothing: only what is raised is of interest."""

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> bool:
        if error is None or not servers_fault(error):
            return False
        if not self._failures:
            log.warning(
                "%s failed (%s: %.200s); training goes on, metrics.csv has every row",
                type(self.inner).__name__,
                type(error).__name__,
                harmless(str(error)),
            )
        self._failures += 1
        self._again = time.monotonic() + PAUSE
        return True


def servers_fault(error: BaseException) -> bool:
    """Whether an exception means that a server could not be reached or did not do its part."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in CLIENTS


RUN_ID = "wandb_run_id.txt"


def continue_wandb(loggers: list[Logger], folder: str) -> None:
    """Give W&B loggers the id that a run's folder keeps, so that a resumed run is the same run there.

    A logger with an id of the user's own keeps that.

    Args:
        loggers: Any; only those of W&B are changed, before they have begun.
        folder: The run's folder; the id is written into it the first time, by the first rank.
    """
    for logger in loggers:
        inner = logger.inner if isinstance(logger, Tolerant) else logger
        if isinstance(inner, WandbLogger) and inner._wandb_init.get("anonymous") is None:
            inner._wandb_init.pop("anonymous", None)  # W&B warns of it, whatever its value
        if isinstance(inner, WandbLogger) and inner._wandb_init.get("id") is None:
            inner._wandb_init["id"] = inner._id = run_id(Path(folder, RUN_ID))
            inner._wandb_init["resume"] = "allow"


def run_id(path: Path) -> str:
    """The id that a file holds; the first rank writes a new one there if there is none, and the others log nothing."""
    if path.is_file():
        return path.read_text().strip()
    new = secrets.token_hex(4)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{new}\n")
    return new


def run_loggers(local: Logger, given: list[Logger]) -> list[Logger]:
    """The file in the run's folder first, then whatever else was asked for.

    Args:
        local: Writes the file; an error of its own, such as a full disk, ends the run.
        given: The others.
    """
    return [local, *(logger if isinstance(logger, CSVLogger) else Tolerant(logger) for logger in given)]


# Package of each of Lightning's loggers, and what to install for it.
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "rlhf_lightning[tensorboard]"),
    "MLFlowLogger": ("mlflow", "rlhf_lightning[mlflow]"),
    "WandbLogger": ("wandb", "wandb"),
    "CometLogger": ("comet_ml", "comet-ml"),
    "NeptuneLogger": ("neptune", "neptune"),
    "LitLogger": ("litlogger", "litlogger"),
}


def check_installed(class_path: str) -> None:
    """Make sure that a logger's package is installed.

    Args:
        class_path: Of the logger; one that is not Lightning's is not checked.

    Raises:
        UserError: If it is not; it says what to install.
    """
    name = class_path.rsplit(".", 1)[-1]
    package, extra = PACKAGES.get(name, (None, ""))
    found = package is None or find_spec(package) or (name == "TensorBoardLogger" and find_spec("tensorboardX"))
    if not found:
        instead = ", or leave W&B out with --wandb disabled" if name == "WandbLogger" else ""
        raise UserError(f"{name} needs the package {package}, which is not installed: pip install '{extra}'{instead}")


def wandb_logger(folder: str, online: bool, group: str | None = None, tags: list[str] | None = None) -> WandbRun:
    """A W&B run in a run's folder, named after it.

    Args:
        folder: Of the run.
        online: Whether metrics are sent while the run goes on.
        group: Runs of one group are shown together.
        tags: To filter runs by.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = "/".join(Path(folder).parts[-2:])
    run = WandbRun(name=name, save_dir=folder, offline=not online, project="rlhf_lightning", group=group, tags=tags)
    continue_wandb([run], folder)
    return run


def log_samples(logger: Logger, columns: list[str], rows: list[list[Any]], step: int) -> None:
    """Send a table of samples to a logger that has tables."""
    inner = logger.inner if isinstance(logger, Tolerant) else logger
    if isinstance(inner, WandbLogger):
        data = [[harmless(x) if isinstance(x, str) else x for x in row] for row in rows]
        logger.log_text("completions", columns=columns, data=data, step=step)  # type: ignore[attr-defined]
