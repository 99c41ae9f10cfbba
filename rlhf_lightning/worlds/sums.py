"""A small world of sums worked out step by step, whose every step is known to be right or wrong.

Its writers slip now and then, and go on from the wrong number. So a policy that learns from them is often wrong at the end,
and a process reward model that learns which steps were slips can tell which of its solutions to trust.
"""

import random
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data.prompt_split import is_held_out, prompt_key
from rlhf_lightning.data.sources import Kind as RowKind
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import UserError

LARGEST = 12  # of all numbers that occur
SEPARATOR = ";"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")


class SumsScore(NamedTuple):
    """What a solution is truly worth.

    Attributes:
        reward: 1 if it ends with the right number, else 0.
        right_steps: Steps before the first that is wrong.
    """

    reward: float
    right_steps: int


class SumsWorld(Source):
    """Solutions to "7 + 4 - 3 + 2 ?", such as "7 + 4 = 11 ; 11 - 3 = 8 ; 8 + 2 = 10", some of them wrong.

    "validation" asks for sums that no training row asks for.
    """

    def __init__(
        self,
        seed: int = 0,
        demonstrations: int = 8000,
        solutions: int = 8000,
        prompts: int = 4000,
        held_out: int = 500,
        steps: int = 3,
        slips: float = 0.2,
    ) -> None:
        """Choose how much of it is seen.

        Args:
            seed: All rows follow from it.
            demonstrations: Training rows for supervised fine-tuning, with the writers' slips.
            solutions: Training rows for process reward models: the same, with a rating of each step.
            prompts: Training rows for reinforcement learning and sampling methods.
            held_out: Rows of each "validation" split.
            steps: Of every solution.
            slips: How likely a step is wrong.

        Raises:
            UserError: If a number is out of range.
        """
        self.rows: dict[RowKind, int] = {"demonstrations": demonstrations, "stepwise": solutions, "prompts": prompts}
        if min(*self.rows.values(), held_out, steps) < 1 or not 0 <= slips < 1:
            raise UserError("SumsWorld: numbers of rows and steps are at least 1, slips is a probability in [0, 1)")
        self.seed, self.held_out, self.steps, self.slips = seed, held_out, steps, slips

    def __str__(self) -> str:
        return f"SumsWorld(seed={self.seed}, steps={self.steps}, slips={self.slips})"

    def load(self, kind: RowKind) -> DatasetDict:
        """Rows of this kind: "train" and "validation", the same in every process.

        Raises:
            UserError: If there are none of this kind.
        """
        if kind not in self.rows:
            raise UserError(f"SumsWorld has no {kind!r}; it has {', '.join(self.rows)}")
        made = DatasetDict()
        for split, count in (("train", self.rows[kind]), ("validation", self.held_out)):
            rng = random.Random(f"{kind} {split} {self.seed}")
            made[split] = Dataset.from_list([self._row(rng, kind, split == "validation") for _ in range(count)])
        return made

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a number and a sign."""
        words = [*SPECIAL_TOKENS, "+", "-", "=", "?", SEPARATOR, *map(str, range(LARGEST + 1))]
        backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        names = {f"{name[1:-1]}_token": name for name in SPECIAL_TOKENS}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names, clean_up_tokenization_spaces=False)

    def gold(self, prompt: str, response: str, truncated: bool = False) -> SumsScore:
        """What a response is truly worth; one that was cut off is worth nothing."""
        words, steps = prompt.split(), [step.split() for step in response.split(SEPARATOR) if step.strip()]
        value, right = int(words[0]), 0
        for place, step in enumerate(steps):
            if place == self.steps:
                break
            sign, operand = words[1 + 2 * place : 3 + 2 * place]
            after = reckoned(value, sign, int(operand))
            if step != [str(value), sign, operand, "=", str(after)]:
                break
            value, right = after, right + 1
        answer = total(words)
        solved = len(steps) == self.steps and steps[-1][-1:] == [str(answer)] and not truncated
        return SumsScore(float(solved), right)

    def _row(self, rng: random.Random, kind: RowKind, held_out: bool) -> dict[str, Any]:
        prompt = self._prompt(rng, held_out)
        if kind == "prompts":
            return {"prompt": prompt, "answer": str(total(prompt.split()))}
        steps, ratings = self._solution(rng, prompt.split())
        if kind == "demonstrations":
            return {"prompt": prompt, "completion": f" {SEPARATOR} ".join(steps)}
        return {"prompt": prompt, "completions": steps, "ratings": ratings}

    def _prompt(self, rng: random.Random, held_out: bool) -> str:
        """A sum that never leaves the numbers that there are."""
        while True:
            value = rng.randint(0, 9)
            words, inside = [str(value)], True
            for _ in range(self.steps):
                sign, operand = rng.choice("+-"), rng.randint(1, 4)
                value = reckoned(value, sign, operand)
                words += [sign, str(operand)]
                inside = inside and 0 <= value <= LARGEST
            prompt = " ".join([*words, "?"])
            if inside and is_held_out(prompt_key(prompt), 0.2, 0) == held_out:
                return prompt

    def _solution(self, rng: random.Random, words: list[str]) -> tuple[list[str], list[int]]:
        """Steps, and 1 or -1 for each: whether the number after its equals sign follows from what stands before it."""
        value, steps, ratings = int(words[0]), [], []
        for sign, operand in zip(words[1::2], words[2::2], strict=False):
            after = reckoned(value, sign, int(operand))
            others = [n for n in range(after - 3, after + 4) if 0 <= n <= LARGEST and n != after]
            slip = rng.random() < self.slips or not 0 <= after <= LARGEST
            said = rng.choice(others) if slip and others else after
            steps.append(f"{value} {sign} {operand} = {min(max(said, 0), LARGEST)}")
            ratings.append(-1 if slip else 1)
            value = min(max(said, 0), LARGEST)
        return steps, ratings


def reckoned(value: int, sign: str, operand: int) -> int:
    """One step."""
    return value + operand if sign == "+" else value - operand


def total(words: list[str]) -> int:
    """What the words of a prompt come to."""
    value = int(words[0])
    for sign, operand in zip(words[1::2], words[2::2], strict=False):
        value = reckoned(value, sign, int(operand))
    return value
