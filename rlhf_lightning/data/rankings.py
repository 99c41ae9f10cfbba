"""The data of reward models that learn from rankings of several answers to one prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import RankingBatch
from rlhf_lightning.data.collate import pad_right
from rlhf_lightning.data.encoding import Encoder
from rlhf_lightning.data.limits import LARGEST, Limit
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.rows import Row, read_weight
from rlhf_lightning.data.sources import Rows
from rlhf_lightning.data.template_inputs import inputs_of
from rlhf_lightning.data.tokenization import DIFFER, DIFFERING, IDS, DifferingPrompts, Tokenization, prompts_differ
from rlhf_lightning.data.turns import Piece
from rlhf_lightning.errors import UserError


class RankingDataModule(RowsDataModule):
    """Rankings, as :class:`rlhf_lightning.batches.RankingBatch`; pairs are rankings of two."""

    kind = "rankings"

    def __init__(
        self,
        source: Rows,
        tokenizer: str | None = None,
        batch_size: int = 8,
        max_length: int = 1024,
        bucket_batches: int = 8,
        differing_prompts: DifferingPrompts = "error",
        **shared: Any,
    ) -> None:
        """The keys of the rows, and those that all data modules have.

        Args:
            source: A world, or the path of a file or folder, or a hub id; from Python also a ``Dataset``, a
                ``DatasetDict`` of splits, or a list of dictionaries.
            tokenizer: Folder or hub id; None for the one of the model in training, else the source's own.
            batch_size: Prompts a batch on one rank, each with all its completions.
            max_length: Longest prompt with a completion, in tokens. Longer completions are dropped from their ranking, and
                rankings of which no order is left are dropped; both are counted in the log.
            bucket_batches: Number of optimizer steps whose rows are sorted by length together. More means less padding and less
                randomness.
            differing_prompts: How rankings are handled whose user or system turns differ after their answers part, so that they
                answer different prompts: "error", "drop" (counted), or "accept" to compare them all the same.
            shared: Keys that all data modules have: ``format``, ``columns``, ``bad_rows``, ``split``, ``num_workers``,
                ``seed`` and ``chat_template_kwargs``, see :class:`.RowsDataModule`.
        """
        super().__init__(source, tokenizer, batch_size, bucket_batches=bucket_batches, **shared)
        self.max_length = max_length
        self.differing_prompts: DifferingPrompts = differing_prompts

    def tokenization(self) -> Callable[[], Tokenization]:
        return partial(rankings, self.tokenizer, self.max_length, self.differing_prompts)

    def collator(self) -> "RankingCollator":
        return RankingCollator(self.tokenizer.pad_token_id)


def rankings(
    tokenizer: PreTrainedTokenizerBase, max_length: int = 1024, differing_prompts: DifferingPrompts = "error"
) -> Tokenization:
    """Of rankings: ``prompt_ids``, the ``completion_ids`` one behind the other, their ``completion_lengths`` and ``ranks``,
    ``weight``, and ``length`` of the longest. ``overlong`` completions are not among them; ``places`` are distinct ranks.
    """
    encoder = Encoder(tokenizer)

    def plan(row: Row) -> list[Piece]:
        if differing_prompts == "error" and prompts_differ(row["completions"]):
            raise UserError(DIFFER)
        return encoder.pair_pieces(row["prompt"], row["completions"], inputs_of(row))

    def join(row: Row, pieces: list[Piece], ids: list[list[int]]) -> Row:
        prompt, responses = encoder.join_responses(pieces, ids)
        both = zip((response.ids for response in responses), row["ranks"], strict=True)
        kept = [(answer, rank) for answer, rank in both if len(prompt) + len(answer) <= max_length]
        lengths = [len(answer) for answer, _ in kept]
        return {
            "prompt_ids": prompt,
            "completion_ids": [token for answer, _ in kept for token in answer],
            "completion_lengths": lengths,
            "ranks": [rank for _, rank in kept],
            "weight": read_weight(row),
            "length": len(prompt) + max(lengths, default=0),
            "overlong": len(row["ranks"]) - len(kept),
            "places": len({rank for _, rank in kept}),
            DIFFERING: int(differing_prompts == "drop" and prompts_differ(row["completions"])),
        }

    lists = {"prompt_ids": IDS, "completion_ids": IDS, "completion_lengths": IDS, "ranks": List(Value("float32"))}
    numbers = {name: Value("int32") for name in ("length", "overlong", "places", DIFFERING)}
    limits = (
        Limit("places", 2, LARGEST, "drop", f"rankings without an order among completions up to {max_length} tokens"),
        Limit(DIFFERING, 0, 0, "drop", "rankings whose user or system turns differ after their answers part"),
        Limit("overlong", 0, 0, "cut", f"rankings: they lose completions longer than {max_length} tokens (max_length)"),
    )
    settings = {"max_length": max_length, "differing_prompts": differing_prompts}
    features = Features({**lists, "weight": Value("float32"), **numbers})
    return Tokenization("rankings", encoder, plan, join, features, limits, settings)


@dataclass(frozen=True)
class RankingCollator:
    """Rankings: what :func:`rankings` makes of each row."""

    pad_id: int

    def __call__(self, planned: tuple[dict[str, list[Any]], float]) -> RankingBatch:
        columns, normalizer = planned
        counts = [len(lengths) for lengths in columns["completion_lengths"]]
        prompts = [ids for ids, count in zip(columns["prompt_ids"], counts, strict=True) for _ in range(count)]
        answers = [
            ids[start:stop]
            for ids, lengths in zip(columns["completion_ids"], columns["completion_lengths"], strict=True)
            for start, stop in pairwise(accumulate(lengths, initial=0))
        ]
        ids, attention = pad_right([p + a for p, a in zip(prompts, answers, strict=True)], self.pad_id)
        starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
        return RankingBatch(
            input_ids=ids,
            attention_mask=attention,
            response_mask=attention & (torch.arange(ids.shape[1]) >= starts),
            ranks=torch.tensor([rank for ranks in columns["ranks"] for rank in ranks], dtype=torch.float32),
            prompt=torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
            weight=torch.tensor(columns["weight"], dtype=torch.float32),
            normalizer=torch.tensor(normalizer, dtype=torch.float32),
        )
