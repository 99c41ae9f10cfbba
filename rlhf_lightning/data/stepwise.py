"""The data of process reward models."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rlhf_lightning.data.collate import StepwiseCollator
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.steps import solutions
from rlhf_lightning.data.tokenization import Tokenization

SEPARATOR = "\n"


class StepwiseDataModule(RowsDataModule):
    """Solutions with a verdict on each step, as :class:`rlhf_lightning.batches.StepwiseBatch`."""

    kind = "stepwise"

    def __init__(
        self,
        source: Source | str,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        long_rows: Literal["drop", "error"] = "drop",
        separator: str | None = None,
        train_on_last_step_only: bool = False,
        split: Split = Split(),  # noqa: B008  (frozen)
        num_workers: int = 0,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Remember what to load; arguments as in :class:`.demonstrations.DemonstrationDataModule`, and these.

        Args:
            max_length: Longest prompt with its solution, in tokens.
            long_rows: What becomes of longer ones: left out and counted, or refused. They are never cut.
            separator: What stands behind every step; None for that of the model in training, else a newline.
            train_on_last_step_only: Of each solution, the last labelled step counts alone, in validation too.
        """
        super().__init__(source, tokenizer, batch_size, None, split, num_workers, seed, 8, chat_template_kwargs)
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
