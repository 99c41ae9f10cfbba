"""The data of reward models and of DPO: the same pairs, the same module."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf_lightning.data.collate import PreferenceCollator
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Rows
from rlhf_lightning.data.tokenization import DifferingPrompts, Tokenization, preferences


class PreferenceDataModule(RowsDataModule):
    """Pairs of a chosen and a rejected response, as :class:`rlhf_lightning.batches.PreferenceBatch`."""

    kind = "preferences"

    def __init__(
        self,
        source: Rows,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        bucket_batches: int = 8,
        differing_prompts: DifferingPrompts = "error",
        **shared: Any,
    ) -> None:
        """The keys of the rows, and those that all data modules have.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``, a
                ``DatasetDict`` of splits, or a list of dictionaries.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            batch_size: Pairs a batch on one rank.
            max_length: Longest prompt with a response, in tokens. Pairs of which one side is longer are dropped and counted in
                the log: to cut them would compare other texts than the annotator saw. The log-probabilities of a response are
                those of its assistant turns; a reward model reads all of it.
            bucket_batches: Number of optimizer steps whose rows are sorted by length together. More means less padding and less
                randomness.
            differing_prompts: How pairs are handled whose user or system turns differ after their answers part, so that they
                answer different prompts: "error", "drop" (counted), or "accept" to compare them all the same.
            shared: Keys that all data modules have: ``format``, ``columns``, ``bad_rows``, ``split``, ``num_workers``,
                ``seed`` and ``chat_template_kwargs``, see :class:`.RowsDataModule`.
        """
        super().__init__(source, tokenizer, batch_size, bucket_batches=bucket_batches, **shared)
        self.max_length = max_length
        self.differing_prompts: DifferingPrompts = differing_prompts

    def tokenization(self) -> Callable[[], Tokenization]:
        return partial(preferences, self.tokenizer, self.max_length, self.differing_prompts)

    def collator(self) -> PreferenceCollator:
        return PreferenceCollator(self.tokenizer.pad_token_id)
