"""Worked solutions, such as GSM8K's, as steps of which some have a number changed: labels that nobody had to give."""

import random
import re

from datasets import Dataset, DatasetDict

from rlhf_lightning.data.rows import Row, read_string
from rlhf_lightning.data.sources import FileSource, Kind, Source
from rlhf_lightning.errors import UserError

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


class CorruptedSteps(Source):
    """Columns ``question`` and ``answer`` (a step a line) as stepwise rows.

    In some solutions the last number of one step is changed by a digit. The solution ends there, and that step is wrong; all
    others are taken to be right.
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        corrupted: float = 0.5,
        keep_calculator: bool = True,
        seed: int = 0,
    ) -> None:
        """Remember where to look.

        Args:
            path: File or folder of training rows.
            validation_path: Of validation rows.
            corrupted: Share of the solutions with a wrong step.
            keep_calculator: Leave GSM8K's annotations such as <<2*3=6>> in: with them a changed number can be told by
                comparing, without them by reckoning alone.
            seed: Of the choice of solutions, steps and digits.

        Raises:
            UserError: If the share is none.
        """
        if not 0 <= corrupted <= 1:
            raise UserError(f"corrupted is a share in [0, 1], not {corrupted}")
        self.files = FileSource(path, validation_path)
        self.corrupted, self.keep_calculator, self.seed = corrupted, keep_calculator, seed

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
        made = []
        for number, row in enumerate(rows):
            try:
                made.append(self.convert(row))
            except UserError as error:
                raise UserError(f"{self.files} ({split}), row {number + 1}: {error}") from error
        return Dataset.from_list(made)

    def convert(self, row: Row) -> Row:
        """One row."""
        question, answer = read_string(row, "question"), read_string(row, "answer")
        if not self.keep_calculator:
            answer = re.sub(r"<<[^>]*>>", "", answer)
        steps = [line.strip() for line in answer.split("\n") if line.strip()]
        rng = random.Random(f"{self.seed} {question}")
        numbered = [place for place, step in enumerate(steps) if NUMBER.search(step)]
        if not numbered or rng.random() >= self.corrupted:
            return {"prompt": f"{question}\n", "completions": steps, "labels": [1.0] * len(steps)}
        wrong = rng.choice(numbered)
        steps = [*steps[:wrong], changed(steps[wrong], rng)]
        return {"prompt": f"{question}\n", "completions": steps, "labels": [1.0] * wrong + [0.0]}


def changed(step: str, rng: random.Random) -> str:
    """The step with one digit of its last number replaced by another; a leading digit does not become zero."""
    *_, last = NUMBER.finditer(step)
    places = [place for place in range(*last.span()) if step[place].isdigit()]
    place = rng.choice(places)
    fewest = 1 if place == places[0] and len(places) > 1 else 0
    digit = rng.choice([str(d) for d in range(fewest, 10) if str(d) != step[place]])
    return step[:place] + digit + step[place + 1 :]
