"""Tasks of reasoning-gym: prompts made from a seed, and each answer judged by the task's own verifier."""

import json
import re
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from rlhf_lightning.data.seeds import mixed_seed
from rlhf_lightning.data.sources import Kind, Source
from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.answers import column
from rlhf_lightning.rewards.parallel import Workers, in_parallel
from rlhf_lightning.rewards.reward import Reward, Samples
from rlhf_lightning.rewards.sandbox import Isolation, Limits, Sandbox, installed_packages

COLUMN = "reasoning_gym"
ASKED = "Write your final answer between <answer> and </answer>."


def installed(who: str) -> None:
    """Refuse without the package.

    Raises:
        UserError: If it is missing.
    """
    if find_spec("reasoning_gym") is None:
        raise UserError(f"{who} needs reasoning-gym: pip install 'rlhf_lightning[reasoning]'")


class ReasoningGymSource(Source):
    """Prompts of some tasks in equal number, with the true answer and what the reward needs to find the task again."""

    def __init__(
        self,
        tasks: dict[str, dict[str, Any]],
        size: int = 1000,
        validation: int = 64,
        seed: int = 0,
        instruction: str = ASKED,
    ) -> None:
        """Remember what to make.

        Args:
            tasks: Names of tasks, each with what its configuration changes: ``{chain_sum: {max_terms: 3}, countdown: {}}``.
            size: Training prompts of each task.
            validation: Validation prompts of each, from another seed.
            seed: Of the prompts.
            instruction: Goes after each question.

        Raises:
            UserError: If reasoning-gym is not installed, or no task is named.
        """
        installed("ReasoningGymSource")
        if not tasks or size < 1 or validation < 0:
            raise UserError(
                f"ReasoningGymSource: {len(tasks)} tasks of size {size}, {validation}; name one and ask for rows"
            )
        self.tasks, self.size, self.validation, self.seed, self.instruction = tasks, size, validation, seed, instruction

    def __str__(self) -> str:
        return f"reasoning-gym ({', '.join(self.tasks)})"

    def load(self, kind: Kind) -> DatasetDict:
        """See :class:`Source`; the same for every kind."""
        sizes = {"train": self.size, "validation": self.validation}
        # The library draws row i from its seed plus i: seeds side by side would share all rows but one.
        seeds = {name: mixed_seed(name, self.seed) % (2**31 - max(sizes.values())) for name in sizes}
        return DatasetDict(
            {name: Dataset.from_list(self._rows(seeds[name], size)) for name, size in sizes.items() if size}
        )

    def _rows(self, seed: int, size: int) -> list[dict[str, str]]:
        import reasoning_gym

        rows = []
        for name, changes in self.tasks.items():
            config = {**changes, "seed": seed, "size": size}
            try:
                entries = list(reasoning_gym.create_dataset(name, **config))
            except (ValueError, TypeError, AssertionError) as error:
                raise UserError(f"reasoning-gym task '{name}' with {changes}: {error}") from error
            for index, entry in enumerate(entries):
                prompt = f"{entry['question']}\n{self.instruction}".strip()
                mark = json.dumps({"task": name, "config": config, "index": index})
                rows.append({"prompt": prompt, "answer": str(entry["answer"]), COLUMN: mark})
        return rows


class ReasoningGymReward(Reward):
    """What the verifier of a row's own task gives the answer in tags: from 0 to 1, 0 without one.

    Some verifiers evaluate the answer as Python, so each is judged in a sandbox, in a process that ends with it. A response
    that breaks out of such a verifier can still give itself a score: look at what is scored high.
    """

    waits = True

    def __init__(
        self, tag: str = "answer", isolation: Isolation = "auto", seconds: float = 10.0, memory_mb: int = 2048
    ) -> None:
        """Remember how to judge.

        Args:
            tag: The answer is what stands last between <tag> and </tag>.
            isolation: See :class:`.sandbox.Sandbox`.
            seconds: For one answer.
            memory_mb: For one process.

        Raises:
            UserError: If reasoning-gym is not installed.
        """
        installed("ReasoningGymReward")
        self.pattern = re.compile(rf"<{re.escape(tag)}>((?:(?!<{re.escape(tag)}>).)*?)</{re.escape(tag)}>", re.DOTALL)
        self.sandbox = Sandbox(isolation, Limits(memory_mb=memory_mb), installed_packages())
        self.seconds = seconds

    @cached_property
    def workers(self) -> Workers:
        """They load reasoning-gym once."""
        return Workers(self.sandbox, "reasoning", {"limits": {"cpu_seconds": -1}}, self.seconds)

    def prepare(self, device: torch.device | str) -> None:
        """Find out whether there is a sandbox.

        Raises:
            UserError: If there is none.
        """
        _ = self.sandbox.tool

    def score(self, samples: Samples) -> list[float | None]:
        self.prepare("cpu")
        questions = []
        for text, mark in zip(samples.completions, column(samples, COLUMN, self.name), strict=True):
            found = self.pattern.findall(text)
            questions.append({"mark": mark, "answer": found[-1].strip()} if found else None)
        answers = in_parallel(lambda q: self.workers.ask(q) if q else 0.0, questions, self.name)
        return [float(answer or 0.0) for answer in answers]
