"""Worked solutions, such as GSM8K's, as steps of which some have a number changed: labels that nobody had to give."""

import random
import re
from typing import Literal, get_args

from datasets import Dataset, DatasetDict

from rlhf_lightning.data.rows import Row, read_string
from rlhf_lightning.data.sources import FileSource, Kind, Source
from rlhf_lightning.errors import UserError

Wrong = Literal["number", "step"]
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


class CorruptedSteps(Source):
    """Columns ``question`` and ``answer`` (a step a line) as stepwise rows.

    In some solutions one step is made wrong: its last number is changed by a digit, or a step of another row's solution stands
    in its place. The solution ends there; all other steps are taken to be right.
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        corrupted: float = 0.5,
        keep_calculator: bool = True,
        wrong: Wrong = "number",
        seed: int = 0,
    ) -> None:
        """Remember where to look.

        Args:
            path: File or folder of training rows.
            validation_path: File or folder of validation rows.
            corrupted: Share of the solutions with a wrong step.
            keep_calculator: Leave GSM8K's annotations such as <<2*3=6>> in: with them a changed number can be told by
                comparing, without them by reckoning alone.
            wrong: What a wrong step is: "number", or "step", which to tell takes no reckoning.
            seed: Of the choice of solutions, steps and digits.

        Raises:
            UserError: If the share is none, or ``wrong`` no word for anything.
        """
        if not 0 <= corrupted <= 1:
            raise UserError(f"corrupted is a share in [0, 1], not {corrupted}")
        if wrong not in get_args(Wrong):
            raise UserError(f"wrong is one of {', '.join(get_args(Wrong))}, not {wrong!r}")
        self.files = FileSource(path, validation_path)
        self.corrupted, self.keep_calculator, self.wrong, self.seed = corrupted, keep_calculator, wrong, seed

    def __str__(self) -> str:
        return f"{self.files} with corrupted steps"

    def load(self, kind: Kind) -> DatasetDict:
        """Stepwise rows, the same ones every time.

        Raises:
            UserError: If another kind is wanted, or a row has no question or no answer.
        """
        if kind != "stepwise":
            raise UserError(f"CorruptedSteps has stepwise rows, no {kind}; give the file itself as source")
        return DatasetDict({name: self._converted(rows, name) for name, rows in self.files.load(kind).items()})

    def _converted(self, rows: Dataset, split: str) -> Dataset:
        solutions = []
        for number, row in enumerate(rows):
            try:
                solutions.append((read_string(row, "question"), self._steps(read_string(row, "answer"))))
            except UserError as error:
                raise UserError(f"{self.files} ({split}), row {number + 1}: {error}") from error
        if self.wrong == "step" and len(solutions) < 2:
            raise UserError(f"{self.files} ({split}) has one row: a foreign step needs another; give wrong: number")
        return Dataset.from_list([self._labelled(number, solutions) for number in range(len(solutions))])

    def _steps(self, answer: str) -> list[str]:
        text = answer if self.keep_calculator else re.sub(r"<<[^>]*>>", "", answer)
        return [line.strip() for line in text.split("\n") if line.strip()]

    def _labelled(self, number: int, solutions: list[tuple[str, list[str]]]) -> Row:
        """One row."""
        question, steps = solutions[number]
        rng = random.Random(f"{self.seed} {question}")
        places = [place for place, step in enumerate(steps) if self.wrong == "step" or NUMBER.search(step)]
        if not places or rng.random() >= self.corrupted:
            return {"prompt": f"{question}\n", "completions": steps, "labels": [1.0] * len(steps)}
        place = rng.choice(places)
        if self.wrong == "number":
            bad = changed(steps[place], rng)
        else:
            bad = rng.choice(solutions[(number + rng.randrange(1, len(solutions))) % len(solutions)][1])
        return {"prompt": f"{question}\n", "completions": [*steps[:place], bad], "labels": [1.0] * place + [0.0]}


def changed(step: str, rng: random.Random) -> str:
    """The step with one digit of its last number replaced by another; a leading digit does not become zero."""
    *_, last = NUMBER.finditer(step)
    places = [place for place in range(*last.span()) if step[place].isdigit()]
    place = rng.choice(places)
    fewest = 1 if place == places[0] and len(places) > 1 else 0
    digit = rng.choice([str(d) for d in range(fewest, 10) if str(d) != step[place]])
    return step[:place] + digit + step[place + 1 :]
