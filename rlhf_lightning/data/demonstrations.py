"""The data of supervised fine-tuning."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rlhf_lightning.data.collate import SequenceCollator
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.tokenization import Tokenization, demonstrations


class DemonstrationDataModule(RowsDataModule):
    """Texts, dialogues or prompts with completions, as :class:`rlhf_lightning.batches.SequenceBatch`.

    A column ``weight`` says what a row counts in the loss; one whose ``completion_truncated`` is true is not taught to end.
    """

    kind = "demonstrations"

    def __init__(
        self,
        source: Source | str,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        mask: Literal["completion", "assistant", "all"] = "completion",
        format: str | None = None,
        split: Split = Split(),  # noqa: B008  (frozen)
        num_workers: int = 0,
        seed: int = 0,
        bucket_batches: int = 8,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Remember what to load.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            batch_size: Rows a batch on one rank.
            max_length: Longest sequence in tokens; longer ones lose their end.
            mask: What is learnt: the completion (of a dialogue its last answer), every assistant turn, or everything; turns of
                users and tools within a completion never are, nor messages with ``weight`` 0 or ``loss``, ``train`` or
                ``trainable`` false. Where the chat template writes earlier turns differently once another follows, as
                those do that take reasoning out of them, every assistant turn is a row of its own.
            format: Name of the row format where it should not be detected.
            split: What is held out.
            num_workers: Processes that collate.
            seed: Of the order of the rows.
            bucket_batches: So many optimizer steps' rows are sorted by length together: less padding, less randomness.
            chat_template_kwargs: Variables of the chat template, by name, such as ``{enable_thinking: false}``; a row's own
                column of that name comes before. They are saved with the tokenizer of the export: `chat`, `sample`, evaluation
                and later stages render with them too.
        """
        super().__init__(
            source, tokenizer, batch_size, format, split, num_workers, seed, bucket_batches, chat_template_kwargs
        )
        self.max_length = max_length
        self.mask: Literal["completion", "assistant", "all"] = mask

    def tokenization(self) -> Callable[[], Tokenization]:
        return partial(demonstrations, self.tokenizer, self.mask, self.max_length)

    def collator(self) -> SequenceCollator:
        return SequenceCollator(self.tokenizer.pad_token_id)
