"""The data of online methods: prompts, and whatever columns their rewards need."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rlhf_lightning.data.collate import PromptCollator
from rlhf_lightning.data.loaders import RowLoader
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.tokenization import Tokenization, prompts


class PromptDataModule(RowsDataModule):
    """Prompts, as :class:`rlhf_lightning.batches.PromptBatch`. A file of demonstrations or pairs serves as well."""

    kind = "prompts"

    def __init__(
        self,
        source: Source | str,
        tokenizer: str | None = None,
        batch_size: int = 128,
        max_prompt_length: int = 512,
        long_prompts: Literal["error", "drop"] = "error",
        validation_prompts: int | None = 256,
        format: str | None = None,
        split: Split = Split(),  # noqa: B008  (frozen)
        num_workers: int = 0,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Remember what to load; arguments as in :class:`.demonstrations.DemonstrationDataModule`, and these.

        Args:
            batch_size: Prompts an iteration on one rank, a response each.
            max_prompt_length: Longest prompt in tokens.
            long_prompts: What becomes of longer ones.
            validation_prompts: How many held-out prompts each validation answers; None for all.
        """
        super().__init__(source, tokenizer, batch_size, format, split, num_workers, seed, 1, chat_template_kwargs)
        self.max_prompt_length, self.validation_prompts = max_prompt_length, validation_prompts
        self.long_prompts: Literal["error", "drop"] = long_prompts

    def tokenization(self) -> Callable[[], Tokenization]:
        return partial(prompts, self.tokenizer, self.max_prompt_length, self.long_prompts)

    def collator(self) -> PromptCollator:
        return PromptCollator(self.tokenizer.pad_token_id)

    def loader(self, name: str, *, shuffle: bool) -> RowLoader:
        """As everywhere, but a validation goes over a fixed few prompts only."""
        if not shuffle and self.validation_prompts is not None:
            few = min(self.validation_prompts, len(self.rows[name]))
            self.rows[name] = self.rows[name].select(range(few))
        return super().loader(name, shuffle=shuffle)
