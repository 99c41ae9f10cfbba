"""The data of reward models and of DPO: the same pairs, the same module."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf_lightning.data.collate import PreferenceCollator
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.tokenization import DifferingPrompts, Tokenization, preferences


class PreferenceDataModule(RowsDataModule):
    """Pairs of a chosen and a rejected response, as :class:`rlhf_lightning.batches.PreferenceBatch`."""

    kind = "preferences"

    def __init__(
        self,
        source: Source | str,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        format: str | None = None,
        split: Split = Split(),  # noqa: B008  (frozen)
        num_workers: int = 0,
        seed: int = 0,
        bucket_batches: int = 8,
        differing_prompts: DifferingPrompts = "error",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Remember what to load; arguments as in :class:`.demonstrations.DemonstrationDataModule`.

        ``batch_size`` counts pairs. Pairs of which one side is longer than ``max_length`` are dropped: to cut them would
        compare other texts than the annotator saw. The log-probabilities of a response are those of its assistant turns; a
        reward model reads all of it.

        Args:
            differing_prompts: How pairs are handled whose user or system turns differ after their answers part, so that they
                answer different prompts: "error", "drop" (counted), or "accept" to compare them all the same.
        """
        super().__init__(
            source, tokenizer, batch_size, format, split, num_workers, seed, bucket_batches, chat_template_kwargs
        )
        self.max_length = max_length
        self.differing_prompts: DifferingPrompts = differing_prompts

    def tokenization(self) -> Callable[[], Tokenization]:
        return partial(preferences, self.tokenizer, self.max_length, self.differing_prompts)

    def collator(self) -> PreferenceCollator:
        return PreferenceCollator(self.tokenizer.pad_token_id)
