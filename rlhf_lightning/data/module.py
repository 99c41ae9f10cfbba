"""What the three data modules share: find the tokenizer, load and split the rows, tokenize once, hand out loaders."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import lightning
from datasets import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.loaders import make_loader, placement
from rlhf_lightning.data.sources import Kind, Source
from rlhf_lightning.data.splits import Split, find_tokenizer, load_splits


class RowsDataModule(lightning.LightningDataModule):
    """Rows of one kind from any source; a subclass says how they are tokenized and collated.

    Attributes:
        rows: Tokenized rows by split: "train", and where there are any "validation" and "ood".
        tokenizer: Set by ``setup``.
    """

    kind: ClassVar[Kind]
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        source: Source | str,
        tokenizer: str | None,
        batch_size: int,
        format: str | None,
        split: Split,
        num_workers: int,
        seed: int,
        bucket_batches: int = 1,
    ) -> None:
        super().__init__()
        self.source, self.tokenizer_path, self.format, self.split = source, tokenizer, format, split
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.bucket_batches = bucket_batches
        self.rows: dict[str, Dataset] = {}

    @abstractmethod
    def tokenize(self, rows: Dataset) -> Dataset:
        """Token ids of canonical rows, with a ``length`` each."""

    @abstractmethod
    def collator(self) -> Callable[..., Any]:
        """Makes a typed batch of tokenized rows."""

    def weights(self, rows: Dataset) -> list[int]:
        """What each row adds to the denominator of the loss."""
        return [1] * len(rows)

    def prepare_data(self) -> None:
        """Fill the cache of tokenized rows, on one process a node."""
        self._load()

    def setup(self, stage: str) -> None:
        """Read the tokenized rows; the first process has them already."""
        if not self.rows:
            self._load()

    def _load(self) -> None:
        self.tokenizer = find_tokenizer(self.tokenizer_path, self.source, self.trainer)
        splits = load_splits(self.source, self.kind, self.format, self.split)
        self.rows = {name: self.tokenize(rows) for name, rows in splits.items()}

    def loader(self, name: str, *, shuffle: bool) -> StatefulDataLoader:
        """A loader over one split."""
        rows = self.rows[name]
        return make_loader(
            rows,
            self.collator(),
            weights=self.weights(rows),
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            place=placement(self.trainer),
            num_workers=self.num_workers,
            bucket_batches=self.bucket_batches,
        )

    def train_dataloader(self) -> StatefulDataLoader:
        """Training rows in length buckets, in a new order each epoch."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        """Held-out rows; an empty list where nothing is held out."""
        return self.loader("validation", shuffle=False) if "validation" in self.rows else []

    def test_dataloader(self) -> Any:
        """Out-of-distribution rows where the source has them, else the held-out ones."""
        return self.loader("ood", shuffle=False) if "ood" in self.rows else self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """What ``predict`` goes over: the held-out rows."""
        return self.val_dataloader()
