"""What a failed run has kept: the error names the checkpoint, and the commands that continue."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.callbacks.checkpoint_file import LAST
from rlhf_lightning.callbacks.export import ExportAtEnd
from rlhf_lightning.callbacks.run_checkpoint import RunCheckpoint
from rlhf_lightning.errors import RunStopped, UserError

log = logging.getLogger(__name__)

LONGEST = 300  # characters of an error that are repeated in the last line


class SaveBeforeMeasuring(Callback):
    """Writes ``last.ckpt`` at the end of an epoch whose module still has scores to measure.

    Lightning calls the module's ``on_train_epoch_end`` before that of :class:`RunCheckpoint`. A failure there would lose
    what was trained since the last checkpoint.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(pl_module, "unmeasured", False):
            pl_module.measure_due = True  # type: ignore[assignment]
            for callback in run_checkpoints(trainer):
                callback.save_now(trainer)


@contextmanager
def kept_training(trainer: Trainer) -> Iterator[None]:
    """Around a fit: an error says which checkpoint holds the training and which commands continue from it.

    An error that is not the user's is logged with its traceback first. It keeps its type if optimizer steps were made since
    the last checkpoint: then the training itself has failed, not something that follows it.

    Raises:
        UserError: With the error's first line and what is kept.
    """
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:  # whatever it is: the training is on the disk, and the user must learn where
        kept, steps = what_is_kept(trainer)
        if kept is None or continues(str(error)):
            raise
        users = isinstance(error, UserError | MisconfigurationException)
        if not users and steps != trainer.global_step:
            error.add_note(kept)
            raise
        if not users:
            log.error("%s", type(error).__name__, exc_info=error)
        first = (str(error).strip().splitlines() or [""])[0]
        reason = str(error) if users else f"{type(error).__name__}: {first:.{LONGEST}}"
        raise UserError(f"{reason}; {kept}") from error


def continues(message: str) -> bool:
    """Whether an error says already how to continue."""
    return "--ckpt_path" in message or "rlhf_lightning export" in message


def what_is_kept(trainer: Trainer) -> tuple[str | None, int]:
    """One line on the newest checkpoint of a run and how to continue from it, and its optimizer step; None without one."""
    for callback in run_checkpoints(trainer):
        if trainer.state.fn == "fit" and callback.kept is not None:
            path, step = callback.kept
            run = trainer.default_root_dir
            flag = "last" if Path(path).name == LAST else shlex.quote(str(path))
            return (
                f"the training up to optimizer step {step} is kept in {path}: to repeat what failed, run the same command with "
                f"--ckpt_path {flag}; to write the model as it is: {export_command(run, path, trainer)}"
            ), step
    return None, 0


def export_command(run: str, checkpoint: str, trainer: Trainer) -> str:
    """The command that writes a checkpoint of a run as the run itself would have."""
    words = ["python", "-m", "rlhf_lightning", "export", "--run", str(run)]
    if Path(checkpoint) != Path(run, "checkpoints", LAST):
        words += ["--checkpoint", str(checkpoint)]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in (callback for callback in callbacks if isinstance(callback, ExportAtEnd)):
        words += ["--output", str(callback.folder)] if callback.folder else []
        words += [] if callback.merge else ["--merge", "false"]
        words += [] if callback.dtype == "source" else ["--dtype", callback.dtype]
    return shlex.join(words)


def run_checkpoints(trainer: Trainer) -> list[RunCheckpoint]:
    """The callbacks that write ``last.ckpt``: one in a run from the command line."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]
