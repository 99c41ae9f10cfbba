"""At the end of a fit, leave a folder that plain transformers loads."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning.callbacks.run_checkpoint import RunCheckpoint
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.ensemble import ScalarEnsemble, members_of
from rlhf_lightning.models.export import ExportDtype, check_replaceable, export_folder, export_members
from rlhf_lightning.models.merging import own_adapter, plain_weights
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.sharding import is_sharded, whole_state_dict

log = logging.getLogger(__name__)


class ExportAtEnd(Callback):
    """Writes ``export/`` into the run's folder, from which the next stage starts.

    With ``checkpoint.monitor`` it holds the best checkpoint, and ``export-last/`` beside it the last weights; else the last
    weights. The log says which. After the fit the module has the weights of ``export/``.

    Attributes:
        exported: The folder, once it is written, and the best checkpoint if it holds that.
    """

    exported: tuple[Path, "Best | None"] | None = None

    def __init__(self, folder: str | None = None, merge: bool = True, dtype: ExportDtype = "source") -> None:
        """Choose where and how to write.

        Args:
            folder: Where to; None for ``export`` in the run's folder.
            merge: Write an adapter merged into its base, which every next stage reads, beside ``adapter/``, which plain peft
                reads; false for the latter alone.
            dtype: ``source`` writes the weights in the precision of the model that training started from, where that has
                fewer bits; ``trained`` in the one they were trained in, which keeps changes too small for half precision.
        """
        self.folder, self.merge, self.dtype = folder, merge, dtype

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        place, base = self._place(trainer), getattr(pl_module, "model_path", None)
        if base is not None and Path(base).resolve() == place.resolve():
            raise UserError(
                f"export.folder {place} is the model that the run begins with, which the export would replace"
            )
        check_replaceable(place)
        check_replaceable(place.with_name(f"{place.name}-last"))

    def _place(self, trainer: Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir, "export"))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if getattr(pl_module, "unmeasured", False):  # a run that failed in measuring its scores, and was completed now
            pl_module.to(trainer.strategy.root_device)
            pl_module.measure_scores()  # type: ignore[operator]
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, RunCheckpoint):
                    callback.add_measured(trainer, pl_module)
        folder, best = self._place(trainer), best_checkpoint(trainer)
        if best is not None:
            last = folder.with_name(f"{folder.name}-last")
            export_module(pl_module, last, trainer.is_global_zero, self.merge, self.dtype)
            load_weights(trainer, pl_module, best.path)
            if trainer.is_global_zero:
                log.info("%s is the best checkpoint, %s; %s is the last", folder, best, last)
        export_module(pl_module, folder, trainer.is_global_zero, self.merge, self.dtype)
        trainer.strategy.barrier("export")
        self.exported = folder, best
        if trainer.is_global_zero and best is None:  # else the log has said it
            log.info("exported to %s (optimizer step %d)", folder, trainer.global_step)


class Best(NamedTuple):
    """The best checkpoint of a run, and the value that it was chosen by."""

    path: str
    monitor: str
    value: float

    def __str__(self) -> str:
        return f"{self.monitor} {self.value:.6g} in {self.path}"


def best_checkpoint(trainer: Trainer) -> Best | None:
    """The best of the checkpoints that ``checkpoint.monitor`` has kept; None where it is not set or has kept none."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        path = trainer.strategy.broadcast(callback.best_model_path)
        if path and Path(path).exists() and callback.best_model_score is not None:
            return Best(path, callback.monitor, float(callback.best_model_score))
        if trainer.is_global_zero and callback.save_top_k != 0:
            logged = sorted(name for name in trainer.callback_metrics if "/" in name)
            log.warning(
                "checkpoint.monitor %s was never logged, so that no best checkpoint was kept and the last one is exported; "
                "logged were %s",
                callback.monitor,
                ", ".join(logged) or "no values of a validation",
            )
    return None


def load_weights(trainer: Trainer, module: LightningModule, path: str) -> None:
    """Load the weights of a checkpoint into the module of a fit that is over; every rank must call."""
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)


def gathered_weights(network: Any) -> dict[str, Any] | None:
    """The whole state dict of a network in shards; None where it holds that itself. Every rank must call."""
    return whole_state_dict(network) if is_sharded(network) else None


def export_module(
    module: Any, folder: str | Path, writes: bool = True, merge: bool = True, dtype: ExportDtype = "source"
) -> Path:
    """Write what a module has trained: the policy, or the reward model with its normalisation.

    Args:
        module: One of the project's modules, configured.
        folder: Where to.
        writes: Whether this rank writes; every rank calls, for shards are gathered from all.
        merge: Write an adapter merged into its base too, not by itself alone. Without an adapter it is no matter.
        dtype: As in :func:`~rlhf_lightning.models.export.export_folder`.
    """
    actor_critic = getattr(module, "actor_critic", None)
    trained = actor_critic.policy if actor_critic is not None else getattr(module, "policy", None) or module.network
    if isinstance(trained, ScalarModel | ScalarEnsemble):
        for member in members_of(trained):
            member.describe_normalisation()
    if isinstance(trained, ScalarEnsemble):
        parts = [(member.network, gathered_weights(member.network)) for member in trained.models]
        return export_members(parts, module.tokenizer, folder, dtype) if writes else Path(folder)
    weights = gathered_weights(trained.network)
    if (adapter := own_adapter(trained.network)) is not None:
        weights = plain_weights(trained.network, writes) if merge else {}
    if not writes:
        return Path(folder)
    return export_folder(trained.network, module.tokenizer, folder, weights, adapter, dtype)
