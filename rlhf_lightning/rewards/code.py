"""Programs against tests, in a sandbox."""

import contextlib
import json
import re
from typing import Any, NamedTuple

import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.answers import column
from rlhf_lightning.rewards.parallel import in_parallel
from rlhf_lightning.rewards.reward import Reward, Samples
from rlhf_lightning.rewards.sandbox import Isolation, Limits, Sandbox
from rlhf_lightning.rewards.verdicts import passed_tests, prints

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


class Task(NamedTuple):
    """A program, and what it is held against: test code, or inputs with the outputs that are due."""

    source: str
    setup: str
    tests: list[str]
    inputs: list[str]
    outputs: list[str]


class CodeReward(Reward):
    """1 for a program that passes every test, else 0; or the share of them that it passes.

    Tests are Python code (a text, or a list of them: ``assert add(1, 2) == 3``, functions called ``test_...``, or HumanEval's
    ``check(candidate)``), or ``{"inputs": [...], "outputs": [...]}`` for programs that read standard input.

    Program and tests run in two sandboxes. The program is asked for values and never sees a test or an expected result; the
    tests see plain data, so that nothing that it overwrites, exits or pretends to be equal changes a verdict. A name that
    the tests use without defining or importing it, Python's own modules aside, is the program's.
    """

    waits = True

    def __init__(
        self,
        tests: str = "tests",
        entry_point: str | None = None,
        prefix: str | None = None,
        setup: str | None = None,
        partial: bool = False,
        isolation: Isolation = "auto",
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        packages: list[str] | None = None,
        workers: int | None = None,
    ) -> None:
        """Remember what to run.

        Args:
            tests: Column with the tests.
            entry_point: Column with the name that is handed to ``check`` of the tests.
            prefix: Column with the code that a response goes on from, such as HumanEval's prompt.
            setup: Column with code before each test, such as MBPP's imports.
            partial: Give the share of tests passed.
            isolation: See :class:`.sandbox.Sandbox`.
            limits: Of each program, all its tests together; with standard input, of each run.
            packages: Folders of Python packages that programs and tests may import.
            workers: Programs at a time.
        """
        self.tests, self.entry_point, self.prefix, self.setup = tests, entry_point, prefix, setup
        self.partial, self.workers = partial, workers
        self.sandbox = Sandbox(isolation, limits, tuple(packages or ()))

    def prepare(self, device: torch.device | str) -> None:
        """Find out whether there is a sandbox.

        Raises:
            UserError: If there is none.
        """
        _ = self.sandbox.tool

    def score(self, samples: Samples) -> list[float | None]:
        self.prepare("cpu")
        tasks = [self._task(samples, i) for i in range(len(samples.completions))]
        passed = in_parallel(self._passed, tasks, self.name, self.workers)
        return [sum(p) / len(p) if self.partial else float(all(p)) for p in passed]

    def _task(self, samples: Samples, i: int) -> Task:
        def cell(name: str | None) -> str:
            return str(column(samples, name, self.name)[i] or "") if name is not None else ""

        tests = as_tests(column(samples, self.tests, self.name)[i], self.tests)
        setup = cell(self.setup)
        source = cell(self.prefix) + program_in(samples.completions[i])
        if isinstance(tests, dict):
            return Task(source, setup, [], tests["inputs"], tests["outputs"])
        call = f"\ncheck({cell(self.entry_point)})\n" if self.entry_point is not None else ""
        return Task(source, setup, [test + call for test in tests], [], [])

    def _passed(self, task: Task) -> list[bool]:
        if task.tests:
            return passed_tests(self.sandbox, task.source, task.tests, task.setup)
        passed: list[bool] = []
        for given, due in zip(task.inputs, task.outputs, strict=True):
            right = all(passed) or self.partial  # one that fails is enough
            passed.append(right and prints(self.sandbox, task.source, given, due))
        return passed


def program_in(completion: str) -> str:
    """The last fenced block of Python; all of a text without fences, nothing of one whose fence is never closed."""
    blocks = FENCED.findall(completion)
    if blocks:
        return str(blocks[-1])
    return "" if "```" in completion else completion


def as_tests(value: Any, name: str) -> list[str] | dict[str, list[str]]:
    """The tests of a row.

    Raises:
        UserError: If there are none, or they are in none of the forms.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):  # else it is code
            value = json.loads(value)
    if isinstance(value, dict) and value.get("inputs") and not value.get("fn_name"):
        inputs, outputs = value["inputs"], value.get("outputs")
        if isinstance(outputs, list) and len(inputs) == len(outputs):
            return {"inputs": list(map(_text, inputs)), "outputs": list(map(_text, outputs))}
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts):
        return texts
    raise UserError(
        f"the column '{name}' holds {str(value)[:80]!r}; give code, a list of code, or inputs and outputs in equal number"
    )


def _text(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)
