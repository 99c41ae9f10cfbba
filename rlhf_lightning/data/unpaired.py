"""The data of KTO and its relatives: single answers that somebody liked or disliked."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf_lightning.data.collate import UnpairedCollator
from rlhf_lightning.data.limits import numbers
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Rows
from rlhf_lightning.data.tokenization import Tokenization, unpaired
from rlhf_lightning.errors import UserError


class UnpairedDataModule(RowsDataModule):
    """Completions with a like or a dislike, as :class:`rlhf_lightning.batches.UnpairedBatch`.

    A dataset of pairs is taken apart: each gives a liked and a disliked completion.
    """

    kind = "unpaired"

    def __init__(
        self,
        source: Rows,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        bucket_batches: int = 8,
        **shared: Any,
    ) -> None:
        """The keys of the rows, and those that all data modules have.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``, a
                ``DatasetDict`` of splits, or a list of dictionaries.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            batch_size: Completions a batch on one rank.
            max_length: Longest prompt with its completion, in tokens. Longer ones are dropped and counted in the log: to cut
                them would judge other texts than the annotator saw.
            bucket_batches: Number of optimizer steps whose rows are sorted by length together. More means less padding and less
                randomness.
            shared: Keys that all data modules have: ``format``, ``columns``, ``bad_rows``, ``split``, ``num_workers``,
                ``seed`` and ``chat_template_kwargs``, see :class:`.RowsDataModule`.
        """
        super().__init__(source, tokenizer, batch_size, bucket_batches=bucket_batches, **shared)
        self.max_length = max_length

    def tokenization(self) -> Callable[[], Tokenization]:
        return partial(unpaired, self.tokenizer, self.max_length)

    def collator(self) -> UnpairedCollator:
        """A prompt with another's answer ends where the longest row does: that is as long as networks were checked to read."""
        longest = [int(numbers(part, "length").max()) for part in self.rows.values() if "train" in self.rows]
        return UnpairedCollator(self.tokenizer.pad_token_id, max(longest, default=self.max_length))

    def label_counts(self) -> tuple[int, int] | None:
        """How many training rows were liked, and how many disliked; None of a stream, which nobody has counted."""
        if "train" not in self.rows:
            return None
        liked = int(numbers(self.rows["train"], "label").sum())
        return liked, len(self.rows["train"]) - liked

    def _load(self) -> None:
        super()._load()
        counts = self.label_counts()
        if counts is not None and not all(counts):
            raise UserError(
                f"{self.source}: all {sum(counts)} training rows are {'liked' if counts[0] else 'disliked'}; nothing tells "
                "good from bad in them: add rows of the other kind, or train on liked ones with SFTModule"
            )
