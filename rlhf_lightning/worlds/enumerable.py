"""A world so small that every response can be written down: what is estimated elsewhere can be computed here.

A few prompts, a handful of tokens, responses of two or three of them; the reference policy is a real causal transformer, the
reward a seeded table. The optimum of every KL-regularised objective follows (:mod:`rlhf_lightning.functional.optimum`).
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import product

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lightning.data.sources import Kind as RowKind
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import log_softmax
from rlhf_lightning.worlds.enumerable_policy import EOS, reference_policy, small_tokenizer


class EnumerableWorld(Source):
    """Prompts and preferences of one problem, its table of rewards and its reference policy; all follow from the seed.

    Attributes:
        prompts: The prompts as text.
        prompt_ids: The same as token ids, all of one length.
        responses: Every response as token ids, shortest first: it ends with EOS, or was cut off after
            ``max_new_tokens`` tokens.
        rewards: Of each response to each prompt. Shape (prompts, responses), float64, mean 0 and standard deviation 1.
        truncated: True where a response was cut off before EOS. Shape (responses,), bool.
    """

    def __init__(
        self,
        seed: int = 0,
        response_tokens: int = 8,
        max_new_tokens: int = 3,
        prompts: int = 4,
        preferences: int = 20_000,
        prompt_rows: int = 25_600,
        held_out: int = 256,
    ) -> None:
        """Choose a problem and how much of it is seen.

        Args:
            seed: Reference, rewards and rows follow from it; another seed is another problem.
            response_tokens: Tokens that a response is made of, EOS among them.
            max_new_tokens: Longest response; with 8 tokens there are 57 responses of up to 2 and 400 of up to 3.
            prompts: Different prompts, two tokens each.
            preferences: Training rows for reward models and DPO.
            prompt_rows: Training rows for reinforcement learning: the prompts over and over.
            held_out: Rows of each "validation" split.

        Raises:
            UserError: If a count is too small, or there are too many responses to write down.
        """
        counts = {"max_new_tokens": max_new_tokens, "prompts": prompts, "held_out": held_out}
        counts |= {"preferences": preferences, "prompt_rows": prompt_rows, "response_tokens": response_tokens - 1}
        for name, count in counts.items():
            if count < 1:
                raise UserError(
                    f"EnumerableWorld: {name} is too small; give at least {2 if name == 'response_tokens' else 1}"
                )
        if prompts * response_tokens**max_new_tokens > 100_000:
            raise UserError(
                f"EnumerableWorld: {response_tokens} tokens and {max_new_tokens} of them in a response are too many responses"
                f" for {prompts} prompts to be written down; lower response_tokens, max_new_tokens or prompts"
            )
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.rows: dict[RowKind, int] = {"preferences": preferences, "prompts": prompt_rows}
        self.held_out = held_out
        symbols = next(n for n in range(1, prompts + 1) if n * n >= prompts)
        self._tokenizer = small_tokenizer(symbols, response_tokens - 1)
        self.tokens = [EOS, *range(len(self._tokenizer) - response_tokens + 1, len(self._tokenizer))]
        first = self.tokens[1] - symbols
        self.prompt_ids = [list(pair) for pair in product(range(first, first + symbols), repeat=2)][:prompts]
        self.prompts = [self.text(ids) for ids in self.prompt_ids]
        self.responses = enumerate_responses(self.tokens, EOS, max_new_tokens)
        self.truncated = torch.tensor([ids[-1] != EOS for ids in self.responses])
        self.rewards = self._reward_table()
        self._places = {
            (text, *ids): (x, y) for x, text in enumerate(self.prompts) for y, ids in enumerate(self.responses)
        }

    def __str__(self) -> str:
        return f"EnumerableWorld(seed={self.seed})"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The world's own word-level tokenizer."""
        return self._tokenizer

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, EOS written out: an empty response would else be an empty text."""
        return " ".join(self._tokenizer.convert_ids_to_tokens(list(ids)))

    def reference(self) -> PreTrainedModel:
        """A fresh copy of the reference policy: a causal transformer of 2 layers, 64 wide, random from the seed."""
        return reference_policy(self._tokenizer, self.tokens, self.seed)

    def reward(self, prompt: str, response_ids: Sequence[int]) -> float:
        """The reward of one response.

        Raises:
            UserError: If it is not one of the world's.
        """
        place = self._places.get((prompt, *response_ids))
        if place is None:
            raise UserError(
                f"{response_ids} is no response to {prompt!r} in {self}; set sampling.max_new_tokens to {self.max_new_tokens}"
                " and give the policy of this world"
            )
        return float(self.rewards[place])

    def logps(self, network: PreTrainedModel, temperature: float = 1.0) -> Tensor:
        """Log-probability of every response under any causal language model, by plain forwards without padding or masks.

        Args:
            network: Its gradients flow.
            temperature: Divides the logits.

        Returns:
            Shape (prompts, responses), float64, nats.
        """
        columns = []
        for length in range(1, self.max_new_tokens + 1):
            responses = [ids for ids in self.responses if len(ids) == length]
            ids = torch.tensor([[*x, *y] for x in self.prompt_ids for y in responses])
            logits = network(input_ids=ids, use_cache=False).logits.double()
            logps = log_softmax(logits[:, -length - 1 : -1], temperature).gather(2, ids[:, -length:, None])
            columns.append(logps.sum(dim=(1, 2)).view(len(self.prompts), len(responses)))
        return torch.cat(columns, dim=1)

    @cached_property
    def ref_logps(self) -> Tensor:
        """Log-probability of every response under the reference, computed in float64. Shape (prompts, responses), nats."""
        with torch.no_grad():
            return self.logps(self.reference().double())

    def load(self, kind: RowKind) -> DatasetDict:
        """Make the rows of this kind.

        Args:
            kind: "preferences" (prompt, chosen, rejected, chosen_truncated, rejected_truncated) are Bradley-Terry at scale 1
                on the rewards of two different responses drawn from the reference; "prompts" (prompt) are every prompt
                equally often.

        Returns:
            "train" and "validation".

        Raises:
            UserError: If the kind is another.
        """
        if kind not in self.rows:
            raise UserError(f"EnumerableWorld has no {kind!r}; it has {', '.join(self.rows)}")
        make = self._preferences if kind == "preferences" else self._prompt_rows
        sizes = {"train": self.rows[kind], "validation": self.held_out}
        return DatasetDict({split: make(rows, number) for number, (split, rows) in enumerate(sizes.items())})

    def _prompt_rows(self, rows: int, stream: int) -> Dataset:
        return Dataset.from_dict({"prompt": [self.prompts[i % len(self.prompts)] for i in range(rows)]})

    def _preferences(self, rows: int, stream: int) -> Dataset:
        generator = torch.Generator().manual_seed(10 * self.seed + stream + 1)
        prompt = torch.arange(rows) % len(self.prompts)
        probabilities = self.ref_logps.exp()[prompt]
        pairs = torch.multinomial(probabilities, 2, replacement=True, generator=generator)
        while (same := pairs[:, 0] == pairs[:, 1]).any():  # they say nothing; what is left has the same optimum
            pairs[same] = torch.multinomial(probabilities[same], 2, replacement=True, generator=generator)
        rewards = self.rewards[prompt[:, None], pairs]
        first_wins = torch.rand(rows, generator=generator) < torch.sigmoid(rewards[:, 0] - rewards[:, 1])
        pairs = torch.where(first_wins[:, None], pairs, pairs.flip(1))
        columns: dict[str, list] = {"prompt": [self.prompts[i] for i in prompt]}
        for side, drawn in zip(("chosen", "rejected"), pairs.T, strict=True):
            columns[side] = [self.text(self.responses[i]) for i in drawn]
            columns[f"{side}_truncated"] = self.truncated[drawn].tolist()
        return Dataset.from_dict(columns)

    def _reward_table(self) -> Tensor:
        """For each prompt a weight of every token and of every pair of neighbours, plus 0.3 noise a response."""
        generator = torch.Generator().manual_seed(self.seed)
        size, shape = len(self._tokenizer), (len(self.prompts), len(self.responses))
        tokens = torch.randn(shape[0], size, generator=generator, dtype=torch.float64)
        neighbours = torch.randn(shape[0], size, size, generator=generator, dtype=torch.float64)
        table = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for column, ids in enumerate(self.responses):
            table[:, column] += tokens[:, ids].sum(dim=1) + neighbours[:, ids[:-1], ids[1:]].sum(dim=1)
        return (table - table.mean()) / table.std()


def enumerate_responses(tokens: Sequence[int], eos: int, max_new_tokens: int) -> list[list[int]]:
    """Every response that generation can give back: up to the first EOS, or ``max_new_tokens`` tokens without one."""
    words = [token for token in tokens if token != eos]
    ended = [[*head, eos] for length in range(max_new_tokens) for head in product(words, repeat=length)]
    return ended + [list(cut) for cut in product(words, repeat=max_new_tokens)]
