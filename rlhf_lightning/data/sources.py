"""Where rows come from: a world, a local file or folder, a hub id, or a Dataset already in memory."""

from abc import ABC, abstractmethod
from typing import Literal

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

Kind = Literal["demonstrations", "preferences", "prompts"]


class Source(ABC):
    """Anything that yields rows; a user's own subclass works like the ones below."""

    @abstractmethod
    def load(self, kind: Kind) -> DatasetDict:
        """Read the rows.

        Args:
            kind: What they are wanted for. A world makes another dataset for each; a file holds what it holds.

        Returns:
            A ``DatasetDict`` with "train" and, where the source has one of its own, "validation" and "ood".

        Raises:
            UserError: If a file is missing or malformed; names file, line and column.
        """

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that belongs to these rows, or None where any will do."""
        return None
