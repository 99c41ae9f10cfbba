"""What the data modules share: find the tokenizer, load and split the rows, tokenize once, hand out loaders."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning
import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.bad_rows import BadRows, Policy
from rlhf_lightning.data.cache import dataset_hash
from rlhf_lightning.data.chunks import Reading, make_reading
from rlhf_lightning.data.collector import older_objects_frozen
from rlhf_lightning.data.columns import Columns, parse_columns
from rlhf_lightning.data.limits import numbers
from rlhf_lightning.data.loaders import RowLoader, make_loader, placement, whereabouts
from rlhf_lightning.data.prompt_format import KEY, PromptFormat, format_of_rows, record_format, trained_format
from rlhf_lightning.data.rows import INDEX
from rlhf_lightning.data.sources import Kind, Rows, live_or_named
from rlhf_lightning.data.splits import Split, find_tokenizer, load_splits
from rlhf_lightning.data.streaming import Known, StreamLoader, check_stream
from rlhf_lightning.data.streams import StreamSource
from rlhf_lightning.data.template_inputs import set_default_variables
from rlhf_lightning.data.tokenization import Tokenization
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

LOOKED_AT, MOST_UNKNOWN = 200, 0.05  # rows of each split; share of their tokens


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
        source: Rows,
        tokenizer: str | None = None,
        batch_size: int = 32,
        format: str | None = None,
        columns: Columns | None = None,
        bad_rows: Policy = "error",
        split: Split = Split(),  # noqa: B008  (frozen)
        num_workers: int = 0,
        seed: int = 0,
        bucket_batches: int = 1,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Keys that all data modules have.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``, a
                ``DatasetDict`` of splits, or a list of dictionaries.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            batch_size: Rows a batch on one rank.
            format: Name of the row format where it should not be detected: sharegpt-preference, preference, alpaca-preference,
                messages-preference, hh-rlhf, implicit-preference, swift-preference, swift-pairs, openai-preference, ranking,
                ordering, nemo-ranking, stepwise, stepwise-ratings, prm800k, unpaired-preference, prompt-completion,
                labelled-messages, labelled-sharegpt, labelled-alpaca, alpaca, messages, sharegpt, prompt-only, alpaca-prompt,
                hh-rlhf-text or text.
            columns: The file's column for each column of the format, such as {prompt: question, completion: answer}; a null
                leaves a column out ({system: null}). Of messages inside a conversation, ``role``, ``content`` and
                ``tool_calls`` name their keys and ``roles`` translates their speakers: {messages: dialogue, role: speaker,
                content: text, roles: {Client: user, Agent: assistant}}.
            bad_rows: What happens to rows that can't be read, converted or tokenized. With "error" they end the run, after all
                of them are found. With "drop" they are dropped and counted; more than 5 % are an error.
            split: What is held out, and how many training rows are kept: {validation: 0.05, seed: 0, limit: null}.
            num_workers: Processes that load batches.
            seed: Of the order of the rows.
            bucket_batches: Number of optimizer steps whose rows are sorted by length together. More means less padding and less
                randomness.
            chat_template_kwargs: Variables of the chat template, by name, such as ``{enable_thinking: false}``; a row's own
                column of that name comes before. They are saved with the tokenizer of the export: `chat`, `sample`, evaluation
                and later stages render with them too.
        """
        super().__init__()
        parse_columns(columns)  # what is wrong with it is said before anything is loaded
        self.columns, self.bad_rows = columns, bad_rows
        self.source, self.tokenizer_path, self.format, self.split = live_or_named(source), tokenizer, format, split
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.bucket_batches, self.chat_template_kwargs = bucket_batches, chat_template_kwargs
        self.rows: dict[str, Dataset] = {}
        self._fingerprint: dict[str, Any] = {}
        self._stream: StreamLoader | None = None
        self._known: Known | None = None

    @abstractmethod
    def tokenization(self) -> Callable[[], Tokenization]:
        """Makes what turns canonical rows into token ids; a function of a module, so that workers can be sent it."""

    @abstractmethod
    def collator(self) -> Callable[..., Any]:
        """Makes a typed batch of tokenized rows."""

    def prepare_data(self) -> None:
        """Fill the cache of tokenized rows, on one process a node."""
        self._load()

    def setup(self, stage: str) -> None:
        """Read the tokenized rows; the first process has them already."""
        if not self.rows:
            self._load()
        if isinstance(self.source, StreamSource) and stage == "fit":
            check_stream(self.trainer)

    @older_objects_frozen()
    def _load(self) -> None:
        self.tokenizer = find_tokenizer(self.tokenizer_path, self.source, self.trainer)
        set_default_variables(self.tokenizer, self.chat_template_kwargs)
        bad = BadRows(self.bad_rows)
        splits = load_splits(self.source, self.kind, self.format, self.split, self.columns, bad)
        record_format(self.tokenizer, self._row_format(splits), self.source)
        tokenization = self.tokenization()()
        self.rows = {
            name: tokenization.tokenize(rows, bad=bad, places=bad.places.get(name, bad.places.get("train")))
            for name, rows in splits.items()
        }
        bad.settle()
        for name, rows in self.rows.items():
            warn_of_unknown_tokens(rows, self.tokenizer, f"{self.source}, {name}")

    def _row_format(self, splits: DatasetDict) -> PromptFormat:
        if isinstance(self.source, StreamSource):
            return self._reading(self.source, announce=False).prompt_format
        return format_of_rows(splits["train"])

    def _reading(self, source: StreamSource, announce: bool = True) -> Reading:
        return make_reading(
            source.files(),
            self.kind,
            self.format,
            self.tokenization(),
            self.split.limit,
            parse_columns(self.columns),
            self.bad_rows,
            announce,
        )

    def loader(self, name: str, *, shuffle: bool) -> RowLoader:
        """A loader over one split."""
        rows, weight = self.rows[name], self.tokenization()().weight
        return make_loader(
            rows,
            self.collator(),
            weights=numbers(rows, weight) if weight else np.ones(len(rows), dtype=np.int8),
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            place=placement(self.trainer),
            num_workers=self.num_workers,
            bucket_batches=self.bucket_batches,
        )

    def stream(self, source: StreamSource) -> StreamLoader:
        """A loader over training rows that are read while it runs."""
        return StreamLoader(
            self._reading(source),
            self.collator(),
            batch_size=self.batch_size,
            seed=self.seed,
            place=placement(self.trainer),
            num_workers=self.num_workers,
            bucket_batches=self.bucket_batches,
            window_rows=source.window_rows,
        )

    def scored_batches(self, name: str) -> RowLoader | StreamLoader:
        """Batches of a split to measure scores on: of "train" in the random order of the first epoch, from its beginning.

        The rows of a stream are read anew; their order is random within ``window_rows``.
        """
        if name == "train" and isinstance(self.source, StreamSource):
            return self.stream(self.source)
        return self.loader(name, shuffle=name == "train")

    def fingerprint(self) -> dict[str, Any]:
        """Number and hash of the tokenized training rows, in their order; of a stream, of its files, by name and size."""
        if not self._fingerprint and isinstance(self.source, StreamSource):
            files = [(str(file), file.stat().st_size) for file in self.source.files()]
            self._fingerprint = {"rows": len(files), "hash": hashlib.sha256(repr(files).encode()).hexdigest()}
        if not self._fingerprint:
            rows = self.rows["train"].select_columns([x for x in self.rows["train"].column_names if x != INDEX])
            self._fingerprint = {"rows": len(rows), "hash": dataset_hash(rows)}
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers of the rows, and where in a stream the run is."""
        trainer: Any = self.trainer
        known_rows = {**self.fingerprint(), KEY: trained_format(self.tokenizer)}
        if self._stream is None:
            return known_rows
        known = self._stream.known_at(trainer.current_epoch, trainer.fit_loop.batch_idx + 1)
        return {**known_rows, "stream": list(known)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say aloud if a run goes on with other rows than it began with: nothing that it measures is one run's then."""
        trainer: Any = self.trainer
        then, now = {name: state_dict[name] for name in ("rows", "hash")}, self.fingerprint()
        self._known = Known(*state_dict["stream"]) if then == now and "stream" in state_dict else None
        if trainer.state.fn != "fit" or not trainer.is_global_zero or then == now:
            return
        log.warning(
            "%s: the training rows have changed since the run began (%d %s then, %d now); it goes on with those of now",
            self.source,
            then["rows"],
            "files" if isinstance(self.source, StreamSource) else "rows",
            now["rows"],
        )

    def train_dataloader(self) -> RowLoader | StreamLoader:
        """Training rows in length buckets, in a new order each epoch; in a run, from where the run is."""
        loader: RowLoader | StreamLoader
        if isinstance(self.source, StreamSource):
            loader = self._stream = self.stream(self.source)
            loader.known = self._known or loader.known
        else:
            loader = self.loader("train", shuffle=True)
        if self.trainer is not None:
            loader.where = partial(whereabouts, self.trainer)
        return loader

    def val_dataloader(self) -> Any:
        """Held-out rows; in a fit, an empty list where nothing is held out.

        Raises:
            UserError: Elsewhere, if nothing is held out.
        """
        if "validation" in self.rows:
            return self.loader("validation", shuffle=False)
        command = None if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        if command in ("validate", "test", "predict"):
            raise UserError(
                f"{self.source}: no row is held out, and {command} reads those; set data.split.validation above 0, or give the "
                "source validation rows"
            )
        return []

    def test_dataloader(self) -> Any:
        """Out-of-distribution rows where the source has them, else the held-out ones."""
        return self.loader("ood", shuffle=False) if "ood" in self.rows else self.val_dataloader()

    def predicted_rows(self, batch: Sequence[int]) -> list[int]:
        """Where rows of :meth:`predict_dataloader` are in their file, or in their split of the source; from 0 on.

        Args:
            batch: Their indices among the tokenized rows.
        """
        return self.rows["validation"][batch][INDEX]

    def predict_dataloader(self) -> Any:
        """What ``predict`` goes over: the held-out rows."""
        return self.val_dataloader()


def warn_of_unknown_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Say so where more than a few tokens of the first rows are the unknown one: the text is lost on the model.

    Args:
        rows: Tokenized.
        tokenizer: Theirs.
        origin: What the log calls them.
    """
    names = [name for name in rows.column_names if name.endswith("_ids")]
    if tokenizer.unk_token_id is None or not names:
        return
    first = rows.select_columns(names)[:LOOKED_AT]
    ids = [token for name in names for row in first[name] for token in row]
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown > MOST_UNKNOWN * len(ids):
        log.warning(
            "%s: %.0f %% of the tokens are %s: the tokenizer does not know this text, and nothing is learnt of it; take a "
            "model whose tokenizer does",
            origin,
            100 * unknown / len(ids),
            tokenizer.unk_token,
        )
