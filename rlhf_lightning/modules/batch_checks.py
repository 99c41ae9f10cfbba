"""The batches that a module reads, checked before its step sees them."""

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.batches import (
    PreferenceBatch,
    PromptBatch,
    RankingBatch,
    SequenceBatch,
    StepwiseBatch,
    UnpairedBatch,
)
from rlhf_lightning.errors import UserError

DATA_MODULES: dict[type, str] = {
    SequenceBatch: "DemonstrationDataModule",
    PreferenceBatch: "PreferenceDataModule",
    RankingBatch: "RankingDataModule",
    UnpairedBatch: "UnpairedDataModule",
    StepwiseBatch: "StepwiseDataModule",
    PromptBatch: "PromptDataModule",
}
SHOWN = 6  # keys of a dictionary in the message


def reads(*kinds: type) -> Any:
    """Lightning's hooks ``on_train_batch_start`` and its relatives, of a module that reads these kinds of batches."""

    def on_batch_start(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse a batch of another kind, such as the dictionaries of a user's own DataLoader."""
        check_batch(self, batch, kinds)

    return on_batch_start


def check_batch(module: Any, batch: Any, kinds: tuple[type, ...]) -> None:
    """Make sure that a batch is of a kind that a module reads.

    Raises:
        UserError: If not; names the data module that makes such batches.
    """
    if isinstance(batch, kinds):
        return
    keys = [str(key) for key in batch] if isinstance(batch, Mapping) else []
    more = ", ..." if len(keys) > SHOWN else ""
    what = f"a {type(batch).__name__}" + (f" with {', '.join(keys[:SHOWN])}{more}" if keys else "")
    raise UserError(
        f"{type(module).__name__} reads a {' or a '.join(kind.__name__ for kind in kinds)}, not {what}; give the trainer a "
        f"{' or a '.join(DATA_MODULES[kind] for kind in kinds)}, whose source takes your rows (a file, a Dataset or a list of "
        "dictionaries), or return such a batch (rlhf_lightning.batches) from your collate_fn"
    )
