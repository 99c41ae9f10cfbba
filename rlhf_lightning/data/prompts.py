"""The data of online methods: prompts, and whatever columns their rewards need."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rlhf_lightning.data.collate import PromptCollator
from rlhf_lightning.data.loaders import RowLoader
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Rows
from rlhf_lightning.data.splits import drawn
from rlhf_lightning.data.tokenization import Tokenization, prompts


class PromptDataModule(RowsDataModule):
    """Prompts, as :class:`rlhf_lightning.batches.PromptBatch`. A file of demonstrations or pairs serves as well."""

    kind = "prompts"

    def __init__(
        self,
        source: Rows,
        tokenizer: str | None = None,
        batch_size: int = 128,
        max_prompt_length: int = 512,
        long_prompts: Literal["error", "drop"] = "error",
        validation_prompts: int | None = 256,
        **shared: Any,
    ) -> None:
        """The keys of the rows, and those that all data modules have.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``, a
                ``DatasetDict`` of splits, or a list of dictionaries.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            batch_size: Prompts an iteration on one rank, a response each.
            max_prompt_length: Longest prompt in tokens.
            long_prompts: How longer ones are handled: an error, or dropped and counted in the log.
            validation_prompts: How many held-out prompts, drawn once, each validation answers; None for all.
            shared: Keys that all data modules have: ``format``, ``columns``, ``bad_rows``, ``split``, ``num_workers``,
                ``seed`` and ``chat_template_kwargs``, see :class:`.RowsDataModule`.
        """
        super().__init__(source, tokenizer, batch_size, bucket_batches=1, **shared)
        self.max_prompt_length, self.validation_prompts = max_prompt_length, validation_prompts
        self.long_prompts: Literal["error", "drop"] = long_prompts

    def tokenization(self) -> Callable[[], Tokenization]:
        return partial(prompts, self.tokenizer, self.max_prompt_length, self.long_prompts)

    def collator(self) -> PromptCollator:
        return PromptCollator(self.tokenizer.pad_token_id)

    def loader(self, name: str, *, shuffle: bool) -> RowLoader:
        """As everywhere, but a validation goes over a fixed few prompts only."""
        if not shuffle and self.validation_prompts is not None:
            self.rows[name] = drawn(self.rows[name], self.validation_prompts, self.split.seed)
        return super().loader(name, shuffle=shuffle)
