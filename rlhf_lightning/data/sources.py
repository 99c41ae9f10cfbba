"""Where rows come from: a world, a local file or folder, a hub id, or a Dataset already in memory."""

import copy
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.files import READABLE, ReadOptions, load_path, root_cause
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

Kind = Literal["demonstrations", "preferences", "prompts", "unpaired", "stepwise", "rankings"]


class Source(ABC):
    """Anything that yields rows; a user's own subclass works like the ones below."""

    @abstractmethod
    def load(self, kind: Kind) -> DatasetDict:
        """Read the rows.

        Args:
            kind: What they are wanted for. A world makes another dataset for each; a file holds what it holds.

        Returns:
            A ``DatasetDict`` with "train" and, where the source has one of its own, "validation" and "ood"; a stream gives
            no "train".

        Raises:
            UserError: If a file is missing or malformed; names file, line and column.
        """

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that belongs to these rows, or None where any will do."""
        return None


class FileSource(Source):
    """A local file or folder: .json, .jsonl, .csv or .tsv, these also .gz; .parquet, .arrow, .txt; or from ``save_to_disk``."""

    mark_bad: bool = False  # return unreadable rows as marked rows, which the caller counts
    text_columns: tuple[str, ...] = ()  # of CSV, whatever they look like

    def __init__(
        self, path: str, validation_path: str | None = None, text_separator: str | None = "<|endoftext|>"
    ) -> None:
        """Remember where to look.

        Args:
            path: File or folder of training rows; a folder may hold validation rows too.
            validation_path: File or folder of validation rows.
            text_separator: What stands between the stories of a .txt file; None for blank lines.
        """
        self.path, self.validation_path, self.text_separator = path, validation_path, text_separator

    def __str__(self) -> str:
        return self.path

    def load(self, kind: Kind) -> DatasetDict:
        """See :class:`Source`; the file is read the same for every kind."""
        options = ReadOptions(self.text_separator, self.mark_bad, self.text_columns)
        splits = name_splits(load_path(existing(self.path), options), self.path)
        if self.validation_path is not None:
            held_out = load_path(existing(self.validation_path), options)
            splits["validation"] = name_splits(held_out, self.validation_path)["train"]
        return splits


if TYPE_CHECKING:
    Rows: TypeAlias = Source | str | Path | Dataset | DatasetDict | list[dict[str, Any]]
else:
    Rows = Source | str  # what a config can name: with the others, its errors would be about them


def marking_bad_rows(source: Source, text_columns: tuple[str, ...]) -> Source:
    """A source whose rows that can't be read come marked, see :func:`.bad_row`; of other sources than files, itself."""
    if not isinstance(source, FileSource):
        return source
    marking = copy.copy(source)
    marking.mark_bad, marking.text_columns = True, text_columns
    return marking


class HubSource(Source):
    """A dataset of the Hugging Face hub; nothing is fetched before ``load``, and no code that comes with it is run."""

    def __init__(
        self,
        name: str,
        config: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Remember what to fetch.

        Args:
            name: Its name on the hub, "owner/name".
            config: Which of its configurations, where it has several.
            train_split: Name of the split to train on; slices such as "train[:1000]" work.
            validation_split: Name of the split to validate on.
            revision: Commit, branch or tag: name a commit for a result that can be repeated.
        """
        self.name, self.config, self.revision = name, config, revision
        self.train_split, self.validation_split = train_split, validation_split

    def __str__(self) -> str:
        return self.name

    def load(self, kind: Kind) -> DatasetDict:
        """See :class:`Source`; fetches, or reads what was fetched before."""
        splits = DatasetDict({"train": self.load_split(self.train_split)})
        if self.validation_split is not None:
            splits["validation"] = self.load_split(self.validation_split)
        return splits

    def load_split(self, split: str) -> Dataset:
        """One split.

        Raises:
            UserError: If the hub can't be reached and nothing is cached, or it has no such dataset or split.
        """
        try:
            loaded = load_dataset(self.name, self.config, split=split, revision=self.revision)
        except (DatasetsError, OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
            raise UserError(
                f"hub dataset '{self.name}' (config {self.config}, split {split}) can't load: {root_cause(error)}; "
                "check the name and the connection, or give a local file"
            ) from error
        if not isinstance(loaded, Dataset):
            raise UserError(f"hub dataset '{self.name}': '{split}' is not one split")
        return loaded


class DatasetSource(Source):
    """Rows that are in memory already."""

    def __init__(self, dataset: Dataset | DatasetDict) -> None:
        """Keep the rows.

        Args:
            dataset: A ``Dataset`` of training rows, or a ``DatasetDict`` with "train".
        """
        self.dataset = dataset

    def __str__(self) -> str:
        return "the given dataset"

    def load(self, kind: Kind) -> DatasetDict:
        """See :class:`Source`."""
        given = DatasetDict({"train": self.dataset}) if isinstance(self.dataset, Dataset) else self.dataset
        return name_splits(given, str(self))


def as_source(source: Rows) -> Source:
    """A source for whatever names one: a path, a hub id, a dataset, rows, or a source already.

    Raises:
        UserError: If a path does not exist, the text is neither a path nor "owner/name", or it is nothing of all these.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, Dataset | DatasetDict):
        return DatasetSource(source)
    if isinstance(source, list) and source and all(isinstance(row, dict) for row in source):
        return DatasetSource(Dataset.from_list(source))
    if not isinstance(source, str | Path):
        raise UserError(
            f"source is a {type(source).__name__}; give a path, a hub id, a Dataset, a DatasetDict of splits, a list of "
            "dictionaries, or a Source"
        )
    source = str(source)
    if Path(source).expanduser().exists():
        return FileSource(source)
    owner, _, name = source.partition("/")
    if not (owner and name) or "/" in name or source.startswith((".", "~")) or looks_like_file(name):
        existing(source)
    return HubSource(source)


def live_or_named(source: Rows) -> Source | str:
    """Rows in memory as a source, whose name fits into a message; what is named stays a name until it is loaded."""
    return str(source) if isinstance(source, str | Path) else as_source(source)


def looks_like_file(name: str) -> bool:
    """Whether a name ends as data files do."""
    return name.lower().endswith((*READABLE, ".gz"))


def existing(path: str) -> Path:
    """The path.

    Raises:
        UserError: If nothing is there.
    """
    expanded = Path(path).expanduser()
    if not expanded.exists():
        raise UserError(f"{path} does not exist (working directory {Path.cwd()}); a hub dataset is named 'owner/name'")
    return expanded


def name_splits(splits: DatasetDict, origin: str) -> DatasetDict:
    """Splits under the names that :class:`Source` promises; a lone split is for training, "test" for validation.

    Raises:
        UserError: If none of several splits is "train".
    """
    named = DatasetDict(splits)
    if len(named) == 1:
        named = DatasetDict({"train": next(iter(named.values()))})
    if "train" not in named:
        raise UserError(f"{origin} has splits {', '.join(named)} and none is 'train'")
    for other in ("valid", "dev", "test"):
        if "validation" not in named and other in named:
            log.info("%s: validating on split '%s'", origin, other)
            named["validation"] = named[other]
    return DatasetDict({name: named[name] for name in ("train", "validation", "ood") if name in named})
