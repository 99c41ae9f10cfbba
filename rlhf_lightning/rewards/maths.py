"""Answers to questions with one right answer: the same words or number, or the same mathematics."""

from functools import cached_property
from importlib.util import find_spec

import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.answers import Place, column, final_answer, same_answer
from rlhf_lightning.rewards.parallel import Workers, in_parallel
from rlhf_lightning.rewards.reward import Reward, Samples
from rlhf_lightning.rewards.sandbox import Limits, Sandbox, installed_packages


def truths(samples: Samples, name: str, asker: str) -> list[str]:
    r"""The final answer of each row: what its text boxes or gives after ``####``, else the whole of it.

    Raises:
        UserError: If the column is missing, or a row of it is empty.
    """
    values = column(samples, name, asker)
    for value in values:
        if value is None or not str(value).strip():
            raise UserError(f"{asker}: a row has no answer in its column '{name}'; give it one or leave the row out")
    return [final_answer(str(v), "boxed") or final_answer(str(v), "hashes") or str(v).strip() for v in values]


class FinalAnswerReward(Reward):
    """1 where the final answer is the row's, as a number or word for word; else 0."""

    def __init__(self, answer: str = "answer", place: Place = "any") -> None:
        """Store how answers are compared.

        Args:
            answer: Column with the true answer.
            place: Where to look in a response: "boxed", after "hashes" (####), "last_number", or "any" of these, in that
                order.
        """
        self.answer, self.place = answer, place

    def score(self, samples: Samples) -> list[float | None]:
        pairs = zip(samples.completions, truths(samples, self.answer, self.name), strict=True)
        found = [(final_answer(text, self.place), truth) for text, truth in pairs]
        return [float(given is not None and same_answer(given, truth)) for given, truth in found]


class MathReward(Reward):
    r"""1 where the answer is mathematically that of the row (1/2, 0.5, \frac12; sets, intervals, equations); else 0.

    math-verify reads and compares them, in processes that are killed when an expression takes too long, which counts as wrong.
    A row whose own answer is no mathematics has no score ("does not apply").
    """

    waits = True

    def __init__(
        self, answer: str = "answer", place: Place | None = None, seconds: float = 5.0, memory_mb: int = 2048
    ) -> None:
        """Store how answers are compared.

        Args:
            answer: Column with the true answer.
            place: As for :class:`FinalAnswerReward`; None lets math-verify find the answer, boxed before anything else.
            seconds: For one comparison.
            memory_mb: For one process.

        Raises:
            UserError: If math-verify is not installed.
        """
        if find_spec("math_verify") is None:
            raise UserError("MathReward needs math-verify: pip install 'rlhf_lightning[rules]'")
        self.answer, self.place, self.seconds, self.memory_mb = answer, place, seconds, memory_mb

    @cached_property
    def workers(self) -> Workers:
        """They run no code of the model's: limits are enough."""
        sandbox = Sandbox("none", Limits(memory_mb=self.memory_mb), installed_packages())
        return Workers(sandbox, "mathematics", {"limits": {"cpu_seconds": -1}}, self.seconds)

    def prepare(self, device: torch.device | str) -> None:
        """Start a process, which shows that it can be."""
        self.workers.ask({"truth": "1", "text": "1"})

    def score(self, samples: Samples) -> list[float | None]:
        questions = []
        for text, truth in zip(samples.completions, truths(samples, self.answer, self.name), strict=True):
            found = text if self.place is None else final_answer(text, self.place)
            questions.append({"truth": truth, "text": found if self.place is None else f"${found}$"} if found else None)
        answers = in_parallel(lambda q: self.workers.ask(q) if q else 0.0, questions, self.name)
        return [_score(answer) for answer in answers]


def _score(answer: dict[str, bool] | float | None) -> float | None:
    if isinstance(answer, dict):
        return float(answer["right"]) if answer["readable"] else None
    return 0.0  # no answer was found, or it was not compared in time
