"""At the end of a fit, leave a folder that plain transformers loads."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.callbacks.run_checkpoint import RunCheckpoint
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.ensemble import ScalarEnsemble, members_of
from rlhf_lightning.models.export import check_replaceable, export_folder, export_members
from rlhf_lightning.models.merging import own_adapter, plain_weights
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.sharding import is_sharded, whole_state_dict

log = logging.getLogger(__name__)


class ExportAtEnd(Callback):
    """Writes ``export/`` into the run's folder; the next stage and everybody else starts from it."""

    def __init__(self, folder: str | None = None, merge: bool = True) -> None:
        """Args: where to, None for ``export`` in the run's folder; whether an adapter is written merged into its base, which
        every next stage reads, beside ``adapter/``, which plain peft reads, or the latter alone.
        """
        self.folder, self.merge = folder, merge

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        place, base = self._place(trainer), getattr(pl_module, "model_path", None)
        if base is not None and Path(base).resolve() == place.resolve():
            raise UserError(
                f"export.folder {place} is the model that the run begins with, which the export would replace"
            )
        check_replaceable(place)

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
        made = export_module(pl_module, self._place(trainer), trainer.is_global_zero, self.merge)
        trainer.strategy.barrier("export")
        if trainer.is_global_zero:
            log.info("exported to %s (optimizer step %d)", made, trainer.global_step)


def gathered_weights(network: Any) -> dict[str, Any] | None:
    """The whole state dict of a network in shards; None where it holds that itself. Every rank must call."""
    return whole_state_dict(network) if is_sharded(network) else None


def export_module(module: Any, folder: str | Path, writes: bool = True, merge: bool = True) -> Path:
    """Write what a module has trained: the policy, or the reward model with its normalisation.

    Args:
        module: One of the project's modules, configured.
        folder: Where to.
        writes: Whether this rank writes; every rank calls, for shards are gathered from all.
        merge: Write an adapter merged into its base too, not by itself alone. Without an adapter it is no matter.
    """
    actor_critic = getattr(module, "actor_critic", None)
    trained = actor_critic.policy if actor_critic is not None else getattr(module, "policy", None) or module.network
    if isinstance(trained, ScalarModel | ScalarEnsemble):
        for member in members_of(trained):
            member.describe_normalisation()
    if isinstance(trained, ScalarEnsemble):
        parts = [(member.network, gathered_weights(member.network)) for member in trained.models]
        return export_members(parts, module.tokenizer, folder) if writes else Path(folder)
    weights = gathered_weights(trained.network)
    if (adapter := own_adapter(trained.network)) is not None:
        weights = plain_weights(trained.network, writes) if merge else {}
    return export_folder(trained.network, module.tokenizer, folder, weights, adapter) if writes else Path(folder)
