"""The data of supervised fine-tuning."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rlhf_lightning.data.collate import SequenceCollator
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Rows
from rlhf_lightning.data.tokenization import Tokenization, demonstrations


class DemonstrationDataModule(RowsDataModule):
    """Texts, dialogues or prompts with completions, as :class:`rlhf_lightning.batches.SequenceBatch`.

    A column ``weight`` says what a row counts in the loss; one whose ``completion_truncated`` is true is not taught to end.
    """

    kind = "demonstrations"

    def __init__(
        self,
        source: Rows,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        mask: Literal["completion", "assistant", "all"] = "completion",
        bucket_batches: int = 8,
        **shared: Any,
    ) -> None:
        """The keys of the rows, and those that all data modules have.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``, a
                ``DatasetDict`` of splits, or a list of dictionaries.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            batch_size: Rows a batch on one rank.
            max_length: Longest sequence in tokens. Longer ones lose their end, and are counted in the log.
            mask: What is learnt: the completion (of a dialogue its last answer), every assistant turn, or everything; turns of
                users and tools within a completion never are, nor messages with ``weight`` 0 or ``loss``, ``train`` or
                ``trainable`` false. Where the chat template writes earlier turns differently once another follows, as
                those do that take reasoning out of them, every assistant turn is a row of its own.
            bucket_batches: Number of optimizer steps whose rows are sorted by length together. More means less padding and less
                randomness.
            shared: Keys that all data modules have: ``format``, ``columns``, ``bad_rows``, ``split``, ``num_workers``,
                ``seed`` and ``chat_template_kwargs``, see :class:`.RowsDataModule`.
        """
        super().__init__(source, tokenizer, batch_size, bucket_batches=bucket_batches, **shared)
        self.max_length = max_length
        self.mask: Literal["completion", "assistant", "all"] = mask

    def tokenization(self) -> Callable[[], Tokenization]:
        return partial(demonstrations, self.tokenizer, self.mask, self.max_length)

    def collator(self) -> SequenceCollator:
        return SequenceCollator(self.tokenizer.pad_token_id)
