"""Prompts that bring rows of a pretraining corpus along, for PPO-ptx."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.collate import PromptCollator, SequenceCollator
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.sources import Rows
from rlhf_lightning.data.splits import Split, load_splits
from rlhf_lightning.data.streams import StreamSource
from rlhf_lightning.data.tokenization import demonstrations
from rlhf_lightning.errors import UserError

NUMBER = "pretraining_number"


class PretrainingMixDataModule(PromptDataModule):
    """Prompts as in :class:`.prompts.PromptDataModule`, each with its own few rows of text that keep the policy what it was.

    Which text goes with which prompt is fixed, and so are order, ranks and resume: they are those of the prompts. Of a corpus
    with more rows than ``rows_per_prompt`` times the prompts, the rest is not used.
    """

    def __init__(
        self,
        source: Rows,
        pretraining: Rows,
        rows_per_prompt: int = 1,
        max_length: int = 512,
        tokenizer: str | None = None,
        batch_size: int = 128,
        max_prompt_length: int = 512,
        **shared: Any,
    ) -> None:
        """The keys of the rows, and those that all data modules have.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``, a
                ``DatasetDict`` of splits, or a list of dictionaries.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            pretraining: A world, or the path of a file or folder, or a hub id: text, all of which is learnt.
            rows_per_prompt: Rows of it beside each prompt; InstructGPT takes 8.
            max_length: Longest row in tokens; longer ones lose their end, and are counted in the log.
            batch_size: Prompts an iteration on one rank, a response each.
            max_prompt_length: Longest prompt in tokens.
            shared: Keys that all data modules have: ``format``, ``columns``, ``bad_rows``, ``split``, ``num_workers``,
                ``seed``, ``chat_template_kwargs``, ``long_prompts`` and ``validation_prompts``, see :class:`.PromptDataModule`.
        """
        super().__init__(source, tokenizer, batch_size, max_prompt_length, **shared)
        if rows_per_prompt < 1:
            raise UserError(f"data.rows_per_prompt is at least 1, not {rows_per_prompt}")
        self.pretraining, self.rows_per_prompt, self.max_length = pretraining, rows_per_prompt, max_length

    def _load(self) -> None:
        for name, source in (("source", self.source), ("pretraining", self.pretraining)):
            if isinstance(source, StreamSource):
                raise UserError(
                    f"data.{name}: which text goes with which prompt is fixed, and a stream's rows are not known; "
                    "give a file or folder by its path"
                )
        super()._load()
        texts = load_splits(self.pretraining, "demonstrations", None, Split(validation=0))["train"]
        rows = demonstrations(self.tokenizer, "all", self.max_length).tokenize(texts)
        self.texts = rows.remove_columns("length").shuffle(seed=self.seed)
        prompts = self.rows["train"]
        self.rows["train"] = prompts.add_column(NUMBER, list(range(len(prompts))))

    def collator(self) -> PromptCollator:
        return MixCollator(self.tokenizer.pad_token_id, self.texts, self.rows_per_prompt)


@dataclass(frozen=True)
class MixCollator(PromptCollator):
    """Prompts with their rows of text; held-out prompts have none.

    Attributes:
        texts: ``input_ids`` and ``response_mask`` of each row.
        rows_per_prompt: How many go with one.
    """

    texts: Dataset
    rows_per_prompt: int

    def __call__(self, planned: tuple[dict[str, list[Any]], float]) -> PromptBatch:
        columns, normalizer = planned
        numbers = columns.get(NUMBER)
        batch = super().__call__(({name: x for name, x in columns.items() if name != NUMBER}, normalizer))
        if numbers is None:
            return batch
        k, count = self.rows_per_prompt, len(self.texts)
        rows = self.texts[[(number * k + i) % count for number in numbers for i in range(k)]]
        return batch._replace(pretraining=SequenceCollator(self.pad_id)((rows, normalizer)))
