"""The data of process reward models."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rlhf_lightning.data.collate import StepwiseCollator
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Rows
from rlhf_lightning.data.steps import solutions
from rlhf_lightning.data.tokenization import Tokenization

SEPARATOR = "\n"


class StepwiseDataModule(RowsDataModule):
    """Solutions with a verdict on each step, as :class:`rlhf_lightning.batches.StepwiseBatch`."""

    kind = "stepwise"

    def __init__(
        self,
        source: Rows,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        long_rows: Literal["drop", "error"] = "drop",
        separator: str | None = None,
        train_on_last_step_only: bool = False,
        **shared: Any,
    ) -> None:
        """The keys of the rows, and those that all data modules have.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``, a
                ``DatasetDict`` of splits, or a list of dictionaries.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            batch_size: Solutions a batch on one rank.
            max_length: Longest prompt with its solution, in tokens.
            long_rows: How longer ones are handled: dropped and counted in the log, or an error. They are never cut.
            separator: What stands behind every step; None for that of the model in training, else a newline.
            train_on_last_step_only: Of each solution, only the last labelled step counts, in validation too.
            shared: Keys that all data modules have: ``format``, ``columns``, ``bad_rows``, ``split``, ``num_workers``,
                ``seed`` and ``chat_template_kwargs``, see :class:`.RowsDataModule`.
        """
        super().__init__(source, tokenizer, batch_size, bucket_batches=8, **shared)
        self.max_length, self.separator, self.train_on_last_step_only = max_length, separator, train_on_last_step_only
        self.long_rows: Literal["drop", "error"] = long_rows

    @property
    def step_separator(self) -> str:
        """What stands behind every step."""
        module: Any = getattr(self.trainer, "lightning_module", None)
        return self.separator if self.separator is not None else getattr(module, "separator", SEPARATOR)

    def tokenization(self) -> Callable[[], Tokenization]:
        last = self.train_on_last_step_only
        return partial(solutions, self.tokenizer, self.step_separator, self.max_length, self.long_rows, last)

    def collator(self) -> StepwiseCollator:
        return StepwiseCollator(self.tokenizer.pad_token_id)
