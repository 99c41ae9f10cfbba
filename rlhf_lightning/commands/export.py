"""A checkpoint as a Hugging Face folder."""

import logging
from pathlib import Path

from rlhf_lightning.callbacks.checkpoint_file import LAST, read
from rlhf_lightning.callbacks.export import export_module
from rlhf_lightning.commands.restore import restored_module
from rlhf_lightning.commands.run_folder import CONFIG
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import ExportDtype, check_replaceable

log = logging.getLogger(__name__)


def export(
    run: str,
    checkpoint: str | None = None,
    output: str | None = None,
    merge: bool = True,
    dtype: ExportDtype = "source",
) -> None:
    """Turn a run's checkpoint into a Hugging Face folder: safetensors, tokenizer, template, generation config.

    Args:
        run: Folder of a ``fit``.
        checkpoint: Which of its checkpoints; None for the best where ``checkpoint.monitor`` was set, else for the last.
        output: Where to; None for ``export`` in the run's folder.
        merge: An adapter is written merged into its base, and by itself below that; false for the latter alone.
        dtype: ``source`` writes the weights in the precision of the model that training started from, where that has fewer
            bits; ``trained`` in the one they were trained in.
    """

    folder = Path(run)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{run} holds no {CONFIG}; give the folder of a fit")
    path = Path(checkpoint) if checkpoint else chosen_checkpoint(folder / "checkpoints")
    if not path.is_file():
        found = sorted(str(p) for p in (folder / "checkpoints").glob("*.ckpt"))
        raise UserError(
            f"{path} does not exist; {'there are ' + ', '.join(found) if found else 'the run has no checkpoint'}"
        )
    check_replaceable(output or folder / "export")
    read_checkpoint = read(path)
    if "measured_at" in read_checkpoint and read_checkpoint["measured_at"] is None:
        log.warning(
            "%s was written before its scores were normalised and calibrated: they are exported at the scale that is in it; "
            "to measure them, run the fit again with --ckpt_path last",
            path,
        )
    module = restored_module(folder / CONFIG, read_checkpoint)
    print(export_module(module, output or folder / "export", merge=merge, dtype=dtype))


def chosen_checkpoint(folder: Path) -> Path:
    """The checkpoint that a fit would have exported: the best one where a value was monitored, else the last."""
    last = folder / LAST
    if not last.is_file():
        return last
    for name, state in read(last)["callbacks"].items():
        best = state.get("best_model_path") if name.startswith("RunCheckpoint") else None
        if best and (path := folder / Path(best).name).is_file():
            log.info(
                "the best checkpoint is exported: %s %.6g in %s", state["monitor"], state["best_model_score"], path
            )
            return path
    log.info("the last checkpoint is exported: %s", last)
    return last
