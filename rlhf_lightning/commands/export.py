"""A checkpoint as a Hugging Face folder."""

import logging
from pathlib import Path

from rlhf_lightning.callbacks.checkpoint_file import LAST, read
from rlhf_lightning.callbacks.export import export_module
from rlhf_lightning.commands.restore import restored_module
from rlhf_lightning.commands.run_folder import CONFIG
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import check_replaceable

log = logging.getLogger(__name__)


def export(run: str, checkpoint: str | None = None, output: str | None = None, merge: bool = True) -> None:
    """Turn a run's checkpoint into a Hugging Face folder: safetensors, tokenizer, template, generation config.

    Args:
        run: Folder of a ``fit``.
        checkpoint: Which of its checkpoints; None for the last.
        output: Where to; None for ``export`` in the run's folder.
        merge: An adapter is written merged into its base, and by itself below that; false for the latter alone.
    """

    folder = Path(run)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{run} holds no {CONFIG}; give the folder of a fit")
    path = Path(checkpoint) if checkpoint else folder / "checkpoints" / LAST
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
    print(export_module(module, output or folder / "export", merge=merge))
